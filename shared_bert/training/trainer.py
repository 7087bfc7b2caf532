"""`Trainer` with whole checkpoints, exact resumption, and its speed in the log."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from accelerate import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..folders import writing
from ..hub import CheckpointPushes
from .checkpoints import UNFINISHED, last_checkpoint, publish
from .models import fix_saved_coefficients
from .throughput import peak_flops, training_flops_per_token

NEVER = torch.iinfo(torch.int64).max  # the step at which something happens that does not


class _EpochSetter(TrainerCallback):
    """Tells the data set which epoch begins: in runs of several processes, accelerate tells the sampler only.

    Without it the masks of every epoch would be the first one's.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


def uses_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


class PretrainingTrainer(CheckpointPushes, Trainer):
    """`Trainer` for models of this package.

    Weight decay is for tensors of two or more dimensions: matrices and embeddings, not diagonals, biases or norms.
    The coefficients of ``masa``, and the network that makes them, have none either.
    The log of training has besides `tokens_per_second` (of all processes, evaluation and saving left out) and `mfu`,
    the share of the devices' peak FLOP/s that this amounts to. Evaluation has besides `perplexity`.

    A model is saved whole or not at all: the `config.json` of `output_dir` appears when all else is there. A loss or
    a weight that is infinite or no number ends the run with a `FloatingPointError` before it is logged or saved.

    Args:
        save_more: called with the folder of the trained model, to write into it what goes with the model.
    """

    def __init__(self, *args, save_more: Callable[[Path], None] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochSetter)
        self._save_more = save_more
        self._timed_tokens = 0
        self._first_bad_step = torch.tensor(NEVER, device=self.args.device)
        self._learning_rates = {}  # of the steps since losses were last checked
        self._unfinished = None  # the folder that a checkpoint is being written in

    def create_accelerator_and_postprocess(self):
        # Accelerate overlooks FSDP in processes on CPUs, where FSDP2 runs as well: the type is set to one it knows.
        if uses_fsdp(self.args) and self.args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
            self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def get_decay_parameter_names(self, model) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and "coefficients" not in name.split(".")
        ]

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        if self._timed_tokens == 0:
            self._timer_start = time.perf_counter()
        tokens = inputs["input_ids"].numel()
        self._timed_tokens += tokens
        self._sequence_length = inputs["input_ids"].shape[-1]
        self._predicted_share = inputs.get("num_predictions", tokens) / tokens
        loss = super().training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        self._learning_rates[step] = self._get_learning_rate()
        # Kept on the device, which is not waited for at every step.
        self._first_bad_step = torch.where(loss.isfinite(), self._first_bad_step, self._first_bad_step.clamp(max=step))
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log or self.control.should_evaluate:
            self._check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._check_finite(with_weights=True)
        return super()._finalize_training(*args, **kwargs)

    def _check_finite(self, with_weights: bool = False):
        """Raises the FloatingPointError of all processes, whichever of them had the loss."""
        device = self.args.device
        bad_steps = [self._first_bad_step, torch.tensor(NEVER, device=device)]
        if with_weights:
            parameters = (p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters())
            finite = torch.stack([parameter.isfinite().all().to(device) for parameter in parameters]).all()
            bad_steps[1] = torch.where(finite, bad_steps[1], self.state.global_step)
        of_all = self.accelerator.gather(torch.stack(bad_steps).unsqueeze(0))
        of_loss, of_weights = of_all.amin(0).tolist()
        first = min(of_loss, of_weights)
        if first < NEVER:
            rate = self._learning_rates.get(first, self._get_learning_rate())
            raise FloatingPointError(
                f"the {'loss is' if first == of_loss else 'weights are'} infinite or no number (NaN) at step {first} "
                f"(learning rate {rate:.3g}); {self._last_good_checkpoint()}. Start from its weights, or anew, with a "
                "lower learning_rate, more warmup_steps or a lower max_grad_norm"
            )
        last = self.state.global_step
        self._learning_rates = {step: rate for step, rate in self._learning_rates.items() if step == last}

    def _last_good_checkpoint(self) -> str:
        try:
            return f"the last good checkpoint is {last_checkpoint(self.args.output_dir)}"
        except ValueError:
            return "there is no good checkpoint"

    @cached_property
    def _peak_flops(self) -> float:
        return peak_flops(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self._timed_tokens:
            speed = self._timed_tokens / (time.perf_counter() - self._timer_start)
            flops = training_flops_per_token(self.model, self._sequence_length, self._predicted_share)
            logs["tokens_per_second"] = round(speed * self.args.world_size)
            logs["mfu"] = speed * flops / self._peak_flops
            self._timed_tokens = 0
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        self._timed_tokens = 0
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if (loss := output.metrics.get(f"{metric_key_prefix}_loss")) is not None:
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return output

    def _run_epoch(self, **kwargs):
        # Resumed from its last step, a run has nothing left to do; Trainer would do one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _issue_warnings_after_load(self, load_result):
        # A tied matrix is saved under its other name only: nothing is missing.
        tied = self.model._tied_weights_keys or {}
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, model, trial):
        """Saves a checkpoint, which appears under its name only when it is whole.

        All processes write into one folder: on several machines, on a file system that they share.
        """
        self._check_finite(with_weights=True)
        self._timed_tokens = 0
        output_dir = Path(self.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        unfinished = output_dir / UNFINISHED
        if self.is_world_process_zero():
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        with self._saving(checkpoint, unfinished):
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(unfinished / checkpoint.name):
                self.state.best_model_checkpoint = str(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self.state.save_to_json(str(unfinished / checkpoint.name / TRAINER_STATE_NAME))
                shutil.rmtree(checkpoint, ignore_errors=True)
                (unfinished / checkpoint.name).rename(checkpoint)
            self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    @contextmanager
    def _saving(self, folder: Path, unfinished: Path) -> Iterator[None]:
        try:
            with writing(folder, unfinished):
                yield
        except OSError as error:
            raise OSError(f"{error}; {self._last_good_checkpoint()}") from error
        finally:
            self._unfinished = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None):
        # Checkpoints keep the network that makes the coefficients, for training to go on.
        if self._unfinished is not None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        unfinished = folder / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
        unfinished.mkdir(parents=True)
        with self._saving(folder, unfinished):
            super()._save(str(unfinished), state_dict)
            fix_saved_coefficients(unfinished)
            if self._save_more is not None:
                self._save_more(unfinished)
            publish(unfinished, folder)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Saves the trained model, evaluates it, and saves the metrics of both and the state.

        Returns:
            The metrics of the evaluation.
        """
        self.save_model(_internal_call=True)  # to be pushed when its metrics are there
        evaluation = self.evaluate()
        output_dir = Path(self.args.output_dir)
        with self._saving(output_dir, output_dir / UNFINISHED):
            if self.is_world_process_zero():
                # Trainer reads this file before it writes it, and could not if it was cut off.
                Path(output_dir, "all_results.json").unlink(missing_ok=True)
            self.save_metrics("train", metrics)
            self.save_metrics("eval", evaluation)
            self.save_state()
        return evaluation

    def _get_output_dir(self, trial) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str):
        if self._unfinished is None:  # else it is still being written
            super()._push_from_checkpoint(checkpoint_folder)
