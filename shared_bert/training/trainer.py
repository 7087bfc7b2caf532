"""`Trainer` with whole checkpoints, exact resumption, and its speed in the log."""

import math
import os
import shutil
import time
from functools import cached_property
from pathlib import Path

import torch
from accelerate import DistributedType
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from .checkpoints import UNFINISHED
from .models import fix_saved_coefficients
from .throughput import peak_flops, training_flops_per_token


class _EpochSetter(TrainerCallback):
    """Tells the data set which epoch begins: in runs of several processes, accelerate tells the sampler only.

    Without it the masks of every epoch would be the first one's.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


def uses_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


class PretrainingTrainer(Trainer):
    """`Trainer` for models of this package.

    Weight decay is for tensors of two or more dimensions: matrices and embeddings, not diagonals, biases or norms.
    The coefficients of ``masa``, and the network that makes them, have none either.
    The log of training has besides `tokens_per_second` (of all processes, evaluation and saving left out) and `mfu`,
    the share of the devices' peak FLOP/s that this amounts to. Evaluation has besides `perplexity`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_EpochSetter)
        self._timed_tokens = 0
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
        return super().training_step(model, inputs, *args, **kwargs)

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
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss)
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
        self._timed_tokens = 0
        output_dir = Path(self.args.output_dir)
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        unfinished = output_dir / UNFINISHED
        if self.is_world_process_zero():
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        super()._save_checkpoint(model, trial)
        self._unfinished = None
        if self.state.best_model_checkpoint == str(unfinished / checkpoint.name):
            self.state.best_model_checkpoint = str(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(unfinished / checkpoint.name / TRAINER_STATE_NAME))
            shutil.rmtree(checkpoint, ignore_errors=True)
            (unfinished / checkpoint.name).rename(checkpoint)
            unfinished.rmdir()
            rotate_checkpoints(
                str(output_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None):
        super()._save(output_dir, state_dict)
        # Checkpoints keep the network that makes the coefficients, for training to go on.
        if self._unfinished is None and self.args.should_save:
            fix_saved_coefficients(output_dir or self.args.output_dir)

    def _get_output_dir(self, trial) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str):
        # Pushes run in the background: they start when the folder has been moved.
        if self._unfinished is None:
            super()._push_from_checkpoint(checkpoint_folder)
