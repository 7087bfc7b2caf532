"""Speed and memory of a training step, and speed of decoding, next to another model of the same shape.

Machines are shared and noisy, so the two models take turns, step by step, and the result is the ratio of their
median times. A step is forward, backward and an AdamW update on the same random batch.
"""

import datetime
import multiprocessing
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..conversion.families import AUTO_CLASSES, FAMILIES

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


class Decoding:
    """A model and a prompt; a call continues the prompt greedily by `new_tokens` tokens.

    Args:
        settings: of the "clm" task, in fp32; the sequence is the prompt.
    """

    def __init__(self, settings: StepSettings, new_tokens: int):
        self.model = _model(settings).eval()
        self.prompt = _batch(settings, self.model.config.vocab_size)["input_ids"]
        self.options = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}

    def __call__(self):
        mask = torch.ones_like(self.prompt)
        self.model.generate(self.prompt, attention_mask=mask, pad_token_id=0, **self.options).cpu()


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


def peak_memory(settings, make_step: Callable[[Any], Callable] = TrainingStep) -> int:
    """Return the peak bytes of making a step and running it twice, in a process of its own (CPU: Linux only).

    Args:
        settings: what `make_step` takes; its `device` is "cpu" or "cuda".
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_here, (settings, make_step))


def _peak_memory_here(settings, make_step: Callable[[Any], Callable]) -> int:
    if settings.device == "cpu":
        before = _resident_peak()
    step = make_step(settings)
    for _ in range(2):
        step()
    return _resident_peak() - before if settings.device == "cpu" else torch.cuda.max_memory_allocated()


def _resident_peak() -> int:
    # getrusage would include the parent's peak, which a new process inherits on Linux.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def compare_training_steps(compared: dict[str, StepSettings], rounds: int = 9, warmup: int = 2) -> dict:
    """Time two models in turns, on batches of the same shape.

    Args:
        compared: the settings of both by name; the second is compared with the first.

    Returns:
        By these names the settings, median seconds per step, tokens per second and peak memory in bytes; in addition
        `speedup`, the ratio of the median seconds (above 1 where the second model is faster), the quartiles of the
        ratios round by round, and `memory_ratio`, second to first.
    """
    times = take_turns({name: TrainingStep(settings) for name, settings in compared.items()}, rounds, warmup)
    first, second = compared
    seconds = {name: statistics.median(measured) for name, measured in times.items()}
    tokens = {name: settings.batch_size * settings.sequence_length for name, settings in compared.items()}
    memory = {name: peak_memory(settings) for name, settings in compared.items()}
    return {
        "settings": {name: asdict(settings) for name, settings in compared.items()},
        "rounds": rounds,
        "seconds_per_step": seconds,
        **_speedup(times),
        "tokens_per_second": {name: tokens[name] / seconds[name] for name in compared},
        "peak_memory_bytes": memory,
        "memory_ratio": memory[second] / memory[first],
    }


def compare_decoding(compared: dict[str, StepSettings], new_tokens: int, rounds: int = 9, warmup: int = 1) -> dict:
    """Time the decoding of two models in turns; arguments as of `compare_training_steps` and `Decoding`.

    Returns:
        By their names the settings and median seconds per new token (the prompt's share included), `speedup`, and the
        quartiles of the ratios round by round.
    """
    times = take_turns({name: Decoding(settings, new_tokens) for name, settings in compared.items()}, rounds, warmup)
    return {
        "settings": {name: asdict(settings) for name, settings in compared.items()},
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seconds_per_token": {name: statistics.median(seconds) / new_tokens for name, seconds in times.items()},
        **_speedup(times),
    }


def take_turns(jobs: dict[str, Callable], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Return the seconds of each job in every round. A job must wait for the device."""
    times = {name: [] for name in jobs}
    for round_ in range(warmup + rounds):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def _speedup(times: dict[str, list[float]]) -> dict:
    before, after = times.values()
    ratios = [one / other for one, other in zip(before, after, strict=True)]
    return {
        "speedup": statistics.median(before) / statistics.median(after),
        "speedup_quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios,
    }


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
