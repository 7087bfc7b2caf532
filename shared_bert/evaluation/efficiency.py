"""Speed and memory of training, encoding and decoding, next to another model of the same shape.

Machines are shared and noisy, so the two models take turns, step by step, and the result is the ratio of their
median times. A training step is forward, backward and an AdamW update on the same random batch.
"""

import datetime
import multiprocessing
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..conversion.families import AUTO_CLASSES, FAMILIES
from .tables import markdown_table

MLM_PROBABILITY = 0.15
# Config fields by task: decoders are pre-trained without dropout.
_FIELDS = {"mlm": {}, "clm": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepSettings:
    """Settings of a measured step.

    Args:
        task: "mlm" (BERT-base shape) or "clm" (GPT-2-small shape).
        batch_size, sequence_length: tokens per step are their product.
        attention_scheme: of this package's model; None takes the stock model.
        precision: "fp32" or "bf16" (autocast).
        compiled: whether the model goes through `torch.compile`.
        device: "cpu" or "cuda".
        model_fields: other fields of the config, under the names of `SharedBertConfig`.
    """

    task: str
    batch_size: int
    sequence_length: int
    attention_scheme: str | None
    precision: str = "fp32"
    compiled: bool = False
    device: str = "cpu"
    model_fields: tuple[tuple[str, Any], ...] = ()


class TrainingStep:
    """A model with its optimiser and a batch; a call runs one step and returns the loss in nats."""

    def __init__(self, settings: StepSettings):
        self.settings = settings
        self.model = _model(settings).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = _batch(settings, self.model.config.vocab_size)
        self.forward = torch.compile(self.model) if settings.compiled else self.model

    def __call__(self) -> float:
        precision = PRECISIONS[self.settings.precision]
        with torch.autocast(self.settings.device, precision, enabled=precision is not torch.float32):
            loss = self.forward(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Encoding:
    """A model without a head in evaluation, and a batch; a call computes the last hidden states, in `precision`."""

    def __init__(self, settings: StepSettings):
        self.model = _inference_model(settings).base_model
        self.input_ids = _batch(settings, self.model.config.vocab_size)["input_ids"]
        self.forward = torch.compile(self.model) if settings.compiled else self.model

    @torch.inference_mode()
    def __call__(self) -> float:
        return self.forward(self.input_ids).last_hidden_state[0, 0, 0].item()


@dataclass(frozen=True)
class DecodingSettings(StepSettings):
    """Settings of a `Decoding`: the sequence is the prompt; compiled is with a cache of static size.

    Args:
        new_tokens: how many are generated.
    """

    new_tokens: int = 128


class Decoding:
    """A decoder and a prompt; a call continues the prompt greedily, in `precision`."""

    def __init__(self, settings: DecodingSettings):
        self.model = _inference_model(settings)
        self.prompt = _batch(settings, self.model.config.vocab_size)["input_ids"]
        count = settings.new_tokens
        self.options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        if settings.compiled:
            self.options["cache_implementation"] = "static"

    def __call__(self):
        mask = torch.ones_like(self.prompt)
        self.model.generate(self.prompt, attention_mask=mask, **self.options).cpu()

    def cache_bytes(self) -> int:
        """Return the size of the keys and values of the prompt."""
        with torch.inference_mode():
            cache = self.model(self.prompt, use_cache=True).past_key_values
        streams = {t.untyped_storage().data_ptr(): t for layer in cache.layers for t in (layer.keys, layer.values)}
        return sum(t.numel() * t.element_size() for t in streams.values())


def _inference_model(settings: StepSettings) -> PreTrainedModel:
    return _model(settings).eval().to(PRECISIONS[settings.precision])


def _model(settings: StepSettings) -> PreTrainedModel:
    torch.manual_seed(0)
    family = next(family for family in FAMILIES.values() if family.objective == settings.task)
    # The stock model's own shape, biases and activation: only attention differs.
    like_stock = family.from_stock_config(family.stock_config())
    fields = {"attention_scheme": settings.attention_scheme or "standard", **_FIELDS[settings.task]}
    config = like_stock.with_attention(**fields | dict(settings.model_fields))
    if settings.attention_scheme is None:
        config = family.to_stock_config(config)
    return AUTO_CLASSES[settings.task].from_config(config, attn_implementation="sdpa").to(settings.device)


def _batch(settings: StepSettings, vocab_size: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    shape = (settings.batch_size, settings.sequence_length)
    input_ids = torch.randint(vocab_size, shape, generator=generator)
    batch = {"input_ids": input_ids, "labels": input_ids}
    if settings.task == "mlm":
        predictions = round(MLM_PROBABILITY * settings.sequence_length)
        order = torch.rand(shape, generator=generator).argsort(dim=1)
        batch["labels"] = input_ids.masked_fill(order >= predictions, -100)
        if settings.attention_scheme is not None:
            batch["num_predictions"] = predictions * settings.batch_size
    return {name: value.to(settings.device) if torch.is_tensor(value) else value for name, value in batch.items()}


def peak_memory(settings, make_job: Callable[[Any], Callable] = TrainingStep) -> int:
    """Return the peak bytes of making a job and running it twice, in a process of its own (CPU: Linux only).

    Args:
        settings: what `make_job` takes; its `device` is "cpu" or "cuda".
    """
    return measure_alone(settings, make_job, rounds=0)["peak_memory_bytes"]


def measure_alone(settings, make_job: Callable[[Any], Callable], rounds: int) -> dict:
    """Return the median `seconds` of a job (None if `rounds` is 0), after it ran twice, and `peak_memory_bytes`.

    A process of its own does it, which ends with a `RuntimeError` where memory does not suffice.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure_here, settings, make_job, rounds).result()


def _measure_here(settings, make_job: Callable[[Any], Callable], rounds: int) -> dict:
    on_cpu = settings.device == "cpu"
    before = _resident_peak() if on_cpu else 0
    (times,) = take_turns({"job": make_job(settings)}, rounds, warmup=2).values()
    peak = _resident_peak() - before if on_cpu else torch.cuda.max_memory_allocated()
    return {"seconds": statistics.median(times) if times else None, "peak_memory_bytes": peak}


def _resident_peak() -> int:
    # getrusage would include the parent's peak, which a new process inherits on Linux.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def compare(
    make_job: Callable[[Any], Callable], compared: dict[str, StepSettings], rounds: int = 9, warmup: int = 2
) -> dict:
    """Time two jobs in turns.

    Args:
        make_job: `TrainingStep`, `Encoding` or `Decoding`.
        compared: the settings of both by name; the second is compared with the first.

    Returns:
        By these names the settings, the median `seconds`, their quartiles, and the `first_seconds`, which include
        compiling; in addition `speedup`, the ratio of the median seconds (above 1 where the second model is faster),
        and the quartiles of the ratios round by round.
    """
    times = take_turns({name: make_job(settings) for name, settings in compared.items()}, warmup + rounds)
    first = {name: measured[0] for name, measured in times.items()}
    times = {name: measured[warmup:] for name, measured in times.items()}
    before, after = times.values()
    return {
        "settings": {name: asdict(settings) for name, settings in compared.items()},
        "rounds": rounds,
        "seconds": {name: statistics.median(measured) for name, measured in times.items()},
        "first_seconds": first,
        "seconds_quartiles": {name: quartiles(measured) for name, measured in times.items()},
        "speedup": statistics.median(before) / statistics.median(after),
        "speedup_quartiles": quartiles([one / other for one, other in zip(before, after, strict=True)]),
    }


def compare_training_steps(compared: dict[str, StepSettings], rounds: int = 9, warmup: int = 2) -> dict:
    """Return `compare` of two training steps, with tokens per second, peak bytes and their ratio, second to first."""
    row = compare(TrainingStep, compared, rounds, warmup)
    first, second = compared
    tokens = {name: settings.batch_size * settings.sequence_length for name, settings in compared.items()}
    memory = {name: peak_memory(settings) for name, settings in compared.items()}
    return {
        **row,
        "tokens_per_second": {name: tokens[name] / row["seconds"][name] for name in compared},
        "peak_memory_bytes": memory,
        "memory_ratio": memory[second] / memory[first],
    }


def compare_decoding(compared: dict[str, DecodingSettings], rounds: int = 9, warmup: int = 1) -> dict:
    """Return `compare` of two decoders, with the seconds per new token, prompt included, and the prompt's cache."""
    row = compare(Decoding, compared, rounds, warmup)
    seconds = {name: row["seconds"][name] / settings.new_tokens for name, settings in compared.items()}
    cache_bytes = {name: Decoding(settings).cache_bytes() for name, settings in compared.items()}
    return {**row, "seconds_per_token": seconds, "cache_bytes": cache_bytes}


def take_turns(jobs: dict[str, Callable], rounds: int, warmup: int = 0) -> dict[str, list[float]]:
    """Return the seconds of each job in every round after the warm-up. A job must wait for the device."""
    times = {name: [] for name in jobs}
    generator = random.Random(0)
    for _ in range(warmup + rounds):
        # In another order each time, since the load of a machine can come and go as fast as the turns.
        for name in generator.sample(list(jobs), len(jobs)):
            start = time.perf_counter()
            jobs[name]()
            times[name].append(time.perf_counter() - start)
    return {name: measured[warmup:] for name, measured in times.items()}


def speed_table(rows: list[dict]) -> str:
    """Return results of `compare` as a Markdown table; all compare models of the same two names."""
    columns = ["task", "scheme", "batch", *rows[0]["settings"], "speedup", "quartiles"]
    with_memory = any("memory_ratio" in row for row in rows)
    columns += ["peak memory"] * with_memory
    lines = []
    for row in rows:
        settings = row["settings"]["shared"]
        task = settings["task"] + (", compiled" if settings["compiled"] else "")
        batch = f"{settings['batch_size']} × {settings['sequence_length']}"
        batch += f" + {settings['new_tokens']}" if "new_tokens" in settings else ""
        times = [f"{1000 * t:,.0f} ms" if t > 1 else f"{1000 * t:.1f} ms" for t in row["seconds"].values()]
        low, high = row["speedup_quartiles"][0], row["speedup_quartiles"][-1]
        cells = [task, f"`{settings['attention_scheme']}`", batch, *times, f"{row['speedup']:.2f}×"]
        cells.append(f"{low:.2f} to {high:.2f}")
        if with_memory:
            cells.append(f"{row['memory_ratio']:.2f}×" if "memory_ratio" in row else "–")
        lines.append(cells)
    return markdown_table(columns, lines)


def profile_step(settings: StepSettings) -> dict[str, float]:
    """Return the seconds that each operator takes itself in a training step, by name, the longest first."""
    step = TrainingStep(settings)
    step()
    with torch.profiler.profile() as profile:
        step()
    key = "self_cpu_time_total" if settings.device == "cpu" else "self_device_time_total"
    seconds = {event.key: getattr(event, key) / 1e6 for event in profile.key_averages()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def quartiles(values: list[float]) -> list[float]:
    """Return the three quartiles of values, or the single value."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values


def environment(device: str) -> dict:
    """Return the hardware, versions, commit and day of a measurement."""
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:  # Linux
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        return f"{platform.machine()} CPU"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # an installed package
        return f"shared_bert {version('shared_bert')}"
