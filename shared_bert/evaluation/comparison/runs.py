"""Doing the runs of a comparison, each once, by one process or several.

Every run leaves a record of its own in `results_dir`. Processes share the work by locks on files, so the command may
be started several times, or by `accelerate launch` or `torchrun`. A run that fails leaves its traceback and does not
stop the others.
"""

import gc
import hashlib
import json
import os
import shutil
import statistics
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ...data import load_tokenizer
from ...training.pretraining import pretrain, train_tokenizer_for
from ...training.text import read_documents
from ..efficiency import environment
from ..records import save_record
from .comparison import Comparison, Run, non_embedding
from .evaluation import evaluate_run
from .records import Record, check_records, read_record, record_path

_POLL_SECONDS = 2.0  # between looks at the runs of other processes


def take_own_device():
    """Make this process of several train by itself, on the GPU of its local rank; call it first of all."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if (count := torch.cuda.device_count()) > 1:  # else Trainer would use all of them for one model
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank % count]


class ComparisonRunner:
    """Does the runs of a comparison that have no record yet.

    Args:
        comparison: what to compare.
        may_differ: see `check_records`.

    Raises:
        ValueError: see `check_records`; a file that the evaluation reads is not there.
    """

    def __init__(self, comparison: Comparison, may_differ: Collection[str] = ()):
        comparison.check_files()
        check_records(comparison, may_differ)
        self.comparison = comparison
        self.runs = comparison.runs()
        self._environment = environment(comparison.arguments[2].device.type)
        self._started = time.time()

    def run(self):
        """Do all runs, with progress over them; afterwards `failed` lists those that failed.

        Raises:
            ValueError, FileNotFoundError: no text, or no tokenizer.
        """
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
                record["seconds"] = round(time.perf_counter() - started, 1)
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
            loss = "diverged" if record["loss"] is None else f"evaluation loss {record['loss']:.4f}"
            progress.write(f"{run.name}: {loss} ({record['seconds']:.0f} s)")
            return True

    @property
    def _tokenizer(self) -> Path:
        """The folder of the tokenizer, whose name depends on all that makes it."""
        model_args, data_args, _ = self.comparison.arguments
        made_by = [model_args.tokenizer_name, model_args.tokenizer_vocab_size, model_args.tokenizer_lowercase]
        key = json.dumps([*made_by, self.comparison.objective, asdict(data_args)], sort_keys=True)
        return self.comparison.output_dir / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:12]}"

    def _prepare_tokenizer(self):
        """Read the text, and save the tokenizer of all runs."""
        model_args, data_args, _ = self.comparison.arguments
        documents = read_documents(data_args, seed=0)["train"]
        folder = self._tokenizer
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if folder.exists():
                return
            if model_args.tokenizer_name:
                tokenizer = load_tokenizer(model_args.tokenizer_name)
            else:
                tokenizer = train_tokenizer_for(self.comparison.objective, documents, model_args, data_args.block_size)
            unfinished = folder.with_suffix(".unfinished")
            tokenizer.save_pretrained(unfinished)
            unfinished.replace(folder)

    def _record(self, run: Run) -> Record:
        folder = _folder(self.comparison, run)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that failed or was killed
        folder.mkdir(parents=True)
        tuned = {} if run.tuned else best_options(self.comparison, run.variant.name)
        arguments = self.comparison.arguments_of(run, tuned, folder, self._tokenizer)
        _, _, training_args = arguments
        with (folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                pretrain(*arguments)
            except FloatingPointError as error:
                if not run.tuned:
                    raise
                # That an option makes training diverge is what a sweep is to find out.
                outcome = {"tokens_per_second": None, "curve": [], "loss": None, "diverged": str(error)}
            else:
                outcome = self._outcome(folder)
                if not run.tuned:
                    outcome |= evaluate_run(self.comparison, folder, run.seed)
        cost = self.comparison.costs[run.variant.name]
        return {
            "name": run.variant.name,
            "seed": run.seed,
            "variant": run.variant.identity,
            "settings": self.comparison.settings,
            "learning_rate": training_args.learning_rate,
            "weight_decay": training_args.weight_decay,
            "parameters": cost.parameters,
            "non_embedding": non_embedding(cost),
            "training_flops_per_token": 3 * cost.forward_flops,
            "tokens": self.comparison.tokens_of(run),
            **outcome,
            **self._environment,
        }

    def _outcome(self, folder: Path) -> Record:
        """Return the speed and the losses of a run from Trainer's log."""
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        per_step = self.comparison.tokens_per_step
        # By tokens, since the last loss is logged twice.
        losses = {log["step"] * per_step: log["eval_loss"] for log in history if "eval_loss" in log}
        return {
            "tokens_per_second": statistics.median(
                log["tokens_per_second"] for log in history if "tokens_per_second" in log
            ),
            "curve": [{"tokens": tokens, "loss": loss} for tokens, loss in losses.items()],
            "loss": list(losses.values())[-1],
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
    """Return the learning rate and weight decay of a variant's run with the lowest loss in the sweep, if any.

    Raises:
        ValueError: all of them diverged.
    """
    runs = [run for run in comparison.runs() if run.tuned and run.variant.name == name]
    losses = {run.tuned: read_record(comparison, run)["loss"] for run in runs}
    found = {tuned: loss for tuned, loss in losses.items() if loss is not None}
    if losses and not found:
        raise ValueError(f"all runs of the sweep of {name} diverged")
    return dict(min(found, key=found.get)) if found else {}
