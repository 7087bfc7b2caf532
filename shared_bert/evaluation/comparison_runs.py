"""Training and evaluating the runs of a comparison, each once, by one process or several.

Every run leaves a record of its own in `results_dir`. Processes share the work by locks on files: the command may be
started several times, or by `accelerate launch` on several GPUs, one for each process. A run that fails leaves its
traceback and does not stop the others.
"""

import gc
import json
import os
import shutil
import statistics
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from ..data import load_documents, load_tokenizer
from ..data.tasks import glue_task, load_glue
from ..folders import load_any_model
from ..modeling.losses import IGNORED
from ..training.pretraining import pretrain, train_tokenizer_for
from ..training.text import read_documents
from .classification import run_classification
from .comparison import Comparison, Run, Variant, non_embedding
from .efficiency import environment, take_turns
from .likelihood import blimp_accuracy, document_losses
from .records import load_record, save_record
from .robustness import NOISE_LEVELS, noise_accuracy

_POLL_SECONDS = 2.0  # between looks at the runs of other processes


def cost_report(comparison: Comparison) -> str:
    """Return what the runs without a record will cost, by the speed of the first variant on this machine."""
    lines = [f"{'variant':24}{'parameters':>12}{'outside embeddings':>20}{'share':>8}{'MFLOP/token':>13}"]
    whole = non_embedding(comparison.costs[comparison.baseline])
    for name, cost in comparison.costs.items():
        outside = non_embedding(cost)
        lines.append(
            f"{name:24}{cost.total:12,}{outside:20,}{outside / whole:8.1%}{3 * cost.forward_flops / 1e6:13.1f}"
        )
    open_runs = [run for run in comparison.runs() if not record_path(comparison, run).exists()]
    swept = sum(bool(run.tuned) for run in open_runs)
    flops = sum(map(comparison.flops_of, open_runs))
    speed = _measured_speed(comparison)
    tokens, hours = comparison.tokens_of(comparison.runs()[-1]), flops / speed / 3600
    lines.append(
        f"{len(open_runs)} of {len(comparison.runs())} runs to do, {swept} of them to choose options by; each reads "
        f"{tokens:,} tokens. Training takes {flops:.2e} FLOPs: about {hours:.1f} hours of one process at "
        f"{speed / 1e9:.0f} GFLOP/s, as measured; the evaluations come on top."
    )
    return "\n".join(lines)


class _Step:
    """A variant with its optimizer and a batch of random tokens; a call does one step of training."""

    def __init__(self, comparison: Comparison, variant: Variant):
        _, data_args, training_args = comparison.arguments
        self.device, self.bf16 = training_args.device, training_args.bf16
        self.model = variant.new_model().to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = training_args.per_device_train_batch_size, data_args.block_size
        self.input_ids = torch.randint(comparison.model["vocab_size"], shape, device=self.device)
        self.labels = self.input_ids
        if comparison.objective == "mlm":
            predicted = torch.rand(shape, device=self.device) < data_args.mlm_probability
            self.labels = torch.where(predicted, self.input_ids, IGNORED)

    def __call__(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.input_ids, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for the device


def _measured_speed(comparison: Comparison) -> float:
    """Return the FLOP/s of training steps of the first variant."""
    variant = comparison.variants[0]
    step = _Step(comparison, variant)
    seconds = statistics.median(take_turns({"": step}, rounds=3, warmup=1)[""])
    return 3 * comparison.costs[variant.name].forward_flops * step.input_ids.numel() / seconds


def measure_speed(comparison: Comparison, rounds: int = 15):
    """Measure the training steps of all variants in turns, and write `speed.json` into `results_dir`."""
    steps = {variant.name: _Step(comparison, variant) for variant in comparison.variants}
    seconds = take_turns(steps, rounds, warmup=2)
    tokens = {name: step.input_ids.numel() for name, step in steps.items()}
    speed = {name: round(tokens[name] / statistics.median(times)) for name, times in seconds.items()}
    comparison.results_dir.mkdir(parents=True, exist_ok=True)
    device = comparison.arguments[2].device.type
    save_record(speed_path(comparison), {"tokens_per_second": speed, "rounds": rounds, **environment(device)})


def speed_path(comparison: Comparison) -> Path:
    return comparison.results_dir / "speed.json"


def take_own_device():
    """Make this process of `accelerate launch` one that trains by itself, on its own GPU; call it first of all."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if (count := torch.cuda.device_count()) > 1:  # else Trainer would use all of them for one model
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank % count]


def record_path(comparison: Comparison, run: Run) -> Path:
    return comparison.results_dir / ("sweep" if run.tuned else "records") / f"{run.name}.json"


def check_records(comparison: Comparison, may_differ: Collection[str] = ()):
    """Raise a ValueError if there are records of other settings, or of another commit.

    Args:
        may_differ: "commit", "settings" or "variant": what need not be the same.
    """
    commit = environment("cpu")["commit"]
    for run in comparison.runs():
        path = record_path(comparison, run)
        if not path.exists():
            continue
        wanted = {"commit": commit, "variant": run.variant.identity, "settings": comparison.settings}
        record = load_record(path, ("seed", *wanted))
        for name, value in wanted.items():
            if name not in may_differ and (found := record[name]) != json.loads(json.dumps(value)):
                difference = (
                    f"{name}={found!r}, not {value!r}" if name == "commit" else _difference(found, value, name)
                )
                raise ValueError(
                    f"{path} is a record of {difference}: name another results_dir, or give --may_differ {name}"
                )


def _difference(found: dict[str, Any], wanted: dict[str, Any], where: str) -> str:
    """Return where two nested mappings differ first."""
    for key in {**wanted, **found}:
        mine, theirs = found.get(key), wanted.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict) and mine != theirs:
            return _difference(mine, theirs, f"{where}: {key}")
        if mine != json.loads(json.dumps(theirs)):
            return f"{where}: {key}={mine!r}, not {theirs!r}"
    raise AssertionError("they are equal")


class ComparisonRunner:
    """Does the runs of a comparison that have no record yet.

    Args:
        comparison: what to compare.
        may_differ: see `check_records`.
    """

    def __init__(self, comparison: Comparison, may_differ: Collection[str] = ()):
        comparison.check_files()
        check_records(comparison, may_differ)
        self.comparison = comparison
        self.runs = comparison.runs()
        self.tokenizer = comparison.output_dir / "tokenizer"
        self._started = time.time()

    def run(self):
        """Do all runs, with progress over them; afterwards `failed` lists those that failed."""
        self.comparison.output_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(self.comparison.output_dir / "tokenizer.lock"):
            self._prepare_tokenizer()
        work = {run: self.comparison.flops_of(run) for run in self.runs}  # by which the time left is guessed
        done = sum(work[run] for run in self.runs if self._is_done(run))
        form = "{desc} {percentage:3.0f}% {bar} {elapsed} elapsed, {remaining} left"
        with tqdm(total=sum(work.values()), initial=done, bar_format=form) as progress:
            while True:
                finished = [run for run in self.runs if self._is_done(run)]
                progress.update(sum(work[run] for run in finished) - progress.n)
                progress.set_description_str(f"{len(finished)} of {len(self.runs)} runs")
                open_runs = [run for run in self.runs if not self._is_done(run) and not self._has_failed(run)]
                ready = [run for run in open_runs if self._is_ready(run)]
                if not ready:
                    break
                if not any(self._attempt(run, progress) for run in ready):
                    time.sleep(_POLL_SECONDS)  # other processes have them all

    @property
    def failed(self) -> dict[str, str]:
        """The last line of the error of each run that failed in this call, and the runs that waited for them."""
        errors = {}
        for run in self.runs:
            if self._has_failed(run):
                errors[run.name] = _error_path(self.comparison, run).read_text().strip().splitlines()[-1]
            elif not self._is_done(run):
                errors[run.name] = "waits for the runs of its sweep"
        return errors

    def _is_done(self, run: Run) -> bool:
        return record_path(self.comparison, run).exists()

    def _has_failed(self, run: Run) -> bool:
        path = _error_path(self.comparison, run)
        return path.exists() and path.stat().st_mtime >= self._started

    def _is_ready(self, run: Run) -> bool:
        swept = [other for other in self.runs if other.tuned and other.variant == run.variant]
        return bool(run.tuned) or all(map(self._is_done, swept))

    def _attempt(self, run: Run, progress: tqdm) -> bool:
        """Do a run unless another process does or did; return whether it was done here."""
        with _claim(self.comparison.output_dir / "models" / f"{run.name}.lock") as is_mine:
            if not is_mine or self._is_done(run) or self._has_failed(run):
                return False
            started = time.perf_counter()
            try:
                record = self._record(run)
            except Exception:  # whatever it is, the other runs can go on
                path = _error_path(self.comparison, run)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(traceback.format_exc())
                progress.write(f"{run.name} failed: {path.read_text().strip().splitlines()[-1]}")
                return True
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            save_record(record_path(self.comparison, run), record)
            seconds = time.perf_counter() - started
            progress.write(f"{run.name}: evaluation loss {record['loss']:.4f} ({seconds:.0f} s)")
            return True

    def _prepare_tokenizer(self):
        model_args, data_args, _ = self.comparison.arguments
        if (self.tokenizer / "tokenizer_config.json").exists():
            return
        if model_args.tokenizer_name:
            tokenizer = load_tokenizer(model_args.tokenizer_name)
        else:
            documents = read_documents(data_args, seed=0)["train"]
            tokenizer = train_tokenizer_for(self.comparison.objective, documents, model_args, data_args.block_size)
        tokenizer.save_pretrained(self.tokenizer)

    def _record(self, run: Run) -> dict[str, Any]:
        folder = _folder(self.comparison, run)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that failed or was killed
        folder.mkdir(parents=True)
        tuned = {} if run.tuned else best_options(self.comparison, run.variant.name)
        arguments = self.comparison.arguments_of(run, tuned, folder, self.tokenizer)
        with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            metrics = pretrain(*arguments)
            evaluation = {} if run.tuned else evaluate_run(self.comparison, folder, run.seed)
        training_args = arguments[2]
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        speed = statistics.median(log["tokens_per_second"] for log in history if "tokens_per_second" in log)
        cost = self.comparison.costs[run.variant.name]
        return {
            "name": run.variant.name,
            "seed": run.seed,
            "is_narrow": run.variant.is_narrow,
            "narrow": self.comparison.narrow_of.get(run.variant.name),
            "variant": run.variant.identity,
            "settings": self.comparison.settings,
            "learning_rate": training_args.learning_rate,
            "weight_decay": training_args.weight_decay,
            "parameters": cost.parameters,
            "non_embedding": non_embedding(cost),
            "training_flops_per_token": 3 * cost.forward_flops,
            "tokens": self.comparison.tokens_of(run),
            "tokens_per_second": speed,
            "curve": [
                {"tokens": log["step"] * self.comparison.tokens_per_step, "loss": log["eval_loss"]}
                for log in history
                if "eval_loss" in log
            ],
            "loss": metrics["eval_loss"],
            **evaluation,
            **environment(training_args.device.type),
        }


def _folder(comparison: Comparison, run: Run) -> Path:
    return comparison.output_dir / "models" / run.name


def _error_path(comparison: Comparison, run: Run) -> Path:
    return _folder(comparison, run) / "error.txt"


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Yield whether this process has the lock of a run, which is free again when the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
    else:
        try:
            yield True
        finally:
            lock.release()


def best_options(comparison: Comparison, name: str) -> dict[str, float]:
    """Return the learning rate and weight decay of a variant's run with the lowest loss in the sweep, if any."""
    runs = [run for run in comparison.runs() if run.tuned and run.variant.name == name]
    if not runs:
        return {}
    losses = {run.tuned: load_record(record_path(comparison, run), ("loss",))["loss"] for run in runs}
    return dict(min(losses, key=losses.get))


def evaluate_run(comparison: Comparison, folder: Path, seed: int) -> dict[str, Any]:
    """Return what a comparison's `evaluation` asks for, of a trained model."""
    kinds, found = comparison.evaluation, {}
    model, tokenizer = load_any_model(str(folder)).eval(), load_tokenizer(str(folder))
    model.to("cuda" if torch.cuda.is_available() and not comparison.arguments[2].use_cpu else "cpu")
    if texts := kinds.get("texts"):
        found["texts"] = {
            name: _text_losses(comparison, model, tokenizer, path, texts) for name, path in texts["files"].items()
        }
    if blimp := kinds.get("blimp"):
        found["blimp"] = _blimp(model, tokenizer, blimp)
    del model
    if glue := kinds.get("glue"):
        found["glue"] = _glue(comparison, folder, seed)
    if noise := kinds.get("noise"):
        found["noise"] = _noise(folder / "glue" / noise["task"] / f"seed-{seed}", noise, glue.get("data_dir"))
    return found


def _text_losses(comparison: Comparison, model, tokenizer, path: str, options: dict[str, Any]) -> dict[str, Any]:
    _, data_args, _ = comparison.arguments
    # The file is its own validation text, so that no text is split off.
    documents = load_documents(train_file=path, validation_file=path, text_column=data_args.text_column)["train"]
    # Evenly spaced: neighbours are often of one book.
    step = max(len(documents) // options.get("max_documents", len(documents)), 1)
    texts = documents["text"][::step][: options.get("max_documents")]
    window = options.get("window", data_args.block_size)
    losses = document_losses(
        model, tokenizer, texts, window, options.get("stride"), mlm_probability=data_args.mlm_probability
    )
    return {
        "loss": losses.mean,
        "words": sum(len(text.split()) for text in texts),
        "document_nats": [round(nats, 3) for nats in losses.nats],
        "document_tokens": losses.tokens,
    }


def _blimp(model, tokenizer, options: dict[str, Any]) -> dict[str, Any]:
    of_paradigm = {}
    for row in load_dataset("parquet", data_files=options["pairs"], split="train"):
        of_paradigm.setdefault(row["UID"], []).append(row)
    pairs = [row for rows in of_paradigm.values() for row in rows[: options.get("max_pairs")]]
    results = blimp_accuracy(model, tokenizer, pairs)
    return {**results["overall"], "by_paradigm": results["by_paradigm"]}


def _glue(comparison: Comparison, folder: Path, seed: int) -> dict[str, Any]:
    records = run_classification(*comparison.finetuning(str(folder), seed))
    return {record["task"]: {name: record[name] for name in ("metric", "score", "metrics")} for record in records}


def _noise(folder: Path, options: dict[str, Any], data_dir: str | None) -> list[dict[str, Any]]:
    task = options["task"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = load_glue(task, data_dir)[glue_task(task).validation[0]]
    levels, draws = options.get("levels", NOISE_LEVELS), options.get("draws", 5)
    return noise_accuracy(model, load_tokenizer(str(folder)), rows, task, levels, draws)
