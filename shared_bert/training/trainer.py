"""`Trainer` with whole checkpoints, exact resumption, a stop at the first NaN, and the speed in the log."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch
from accelerate import DistributedType
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..folders import writing
from ..hub import CheckpointPushes
from ..injection.quantizer import SharingQuantizer
from .checkpoints import UNFINISHED, checkpoint_damage, last_checkpoint, publish
from .models import fix_saved_coefficients
from .throughput import peak_flops, training_flops_per_token


def uses_fsdp(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


class _FiniteLosses(TrainerCallback):
    """Calls `check` before losses are logged, evaluated or saved, which Trainer's own callback has decided by then."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check()

    on_epoch_end = on_step_end


class SafeTrainer(CheckpointPushes, Trainer):
    """`Trainer` that resumes exactly, saves whole models only, and stops if training diverges.

    A checkpoint is whole when its `trainer_state.json` is there, which Trainer writes last. The trained model is
    whole when the `config.json` of `output_dir` is there. A loss or a weight that is NaN or infinite ends the run
    with a `FloatingPointError` before it is saved.

    Weight decay applies to tensors of two or more dimensions: matrices and embeddings, not diagonals, biases or norms.
    It does not apply to the coefficients of ``masa`` and the network that makes them.

    Args:
        save_more: called with the folder of the trained model, to add files to it.
    """

    def __init__(self, *args, save_more: Callable[[Path], None] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_FiniteLosses(self._check_finite))
        self._save_more = save_more
        # On the device, so that no step waits for it.
        self._first_bad_step = torch.tensor(math.inf, device=self.args.device)

    def create_accelerator_and_postprocess(self):
        # Accelerate ignores FSDP for processes on CPUs, although FSDP2 runs there: the type is set to one it accepts.
        if uses_fsdp(self.args) and self.args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
            self.args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def get_decay_parameter_names(self, model) -> list[str]:
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and "coefficients" not in name.split(".")
        ]

    def get_batch_samples(self, *args, **kwargs):
        # A run that is resumed from its last step is finished, but Trainer would do one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        first = self._first_bad_step
        self._first_bad_step = torch.where(loss.isfinite(), first, first.clamp(max=self.state.global_step + 1))
        return loss

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError):  # torch and safetensors report a full disk so
            checkpoint = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            if not checkpoint.is_dir() or checkpoint_damage(checkpoint, self.args.save_only_model) is None:
                raise
            with self._writing(checkpoint, checkpoint):
                raise

    # `_internal_call` is Trainer's own parameter: true in calls that should not push.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Save the model: unchanged into a checkpoint, else whole or not at all, with fixed coefficients."""
        self._check_finite(with_weights=True)
        folder = Path(output_dir or self.args.output_dir)
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            if self.args.should_save:
                # Left by an older checkpoint of this step, it would mark the new one as whole too early.
                Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)
            super().save_model(output_dir, _internal_call)
            return
        unfinished = folder / UNFINISHED
        with self._writing(folder, unfinished):
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed run
                unfinished.mkdir(parents=True)
            super().save_model(str(unfinished), _internal_call=True)
            if self.args.should_save:
                fix_saved_coefficients(unfinished, type(self.model))
                if self._save_more is not None:
                    self._save_more(unfinished)
                publish(unfinished, folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        quantizer = getattr(self.model, "hf_quantizer", None)
        # transformers drops the state dict of a model with a quantizer, which FSDP has gathered.
        with quantizer.saving(state_dict) if isinstance(quantizer, SharingQuantizer) else nullcontext():
            super()._save(output_dir, state_dict)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Save the trained model, evaluate it, and save the metrics and the state.

        Returns:
            The metrics of the evaluation.
        """
        self.save_model(_internal_call=True)  # it is pushed later, with its metrics
        evaluation = self.evaluate()
        output_dir = Path(self.args.output_dir)
        with self._writing(output_dir, output_dir / UNFINISHED):
            if self.is_world_process_zero():
                # Trainer reads this file before it writes it, which fails if it is incomplete.
                Path(output_dir, "all_results.json").unlink(missing_ok=True)
            self.save_metrics("train", metrics)
            self.save_metrics("eval", evaluation)
            self.save_state()
        return evaluation

    @contextmanager
    def _writing(self, folder: Path, unfinished: Path) -> Iterator[None]:
        if not self.args.should_save:  # only the process that writes a folder may remove it
            yield
            return
        try:
            with writing(folder, unfinished):
                yield
        except OSError as error:
            raise OSError(f"{error}; {self._last_good_checkpoint()}") from error

    def _check_finite(self, with_weights: bool = False):
        """Raise a FloatingPointError in all processes if one has a loss or weights that are NaN or infinite."""
        first_bad = {"loss is": self._first_bad_step}
        if with_weights:
            parameters = (p.to_local() if hasattr(p, "to_local") else p for p in self.model.parameters())
            finite = torch.stack([parameter.isfinite().all().to(self.args.device) for parameter in parameters]).all()
            first_bad["weights are"] = torch.where(finite, math.inf, float(self.state.global_step))
        of_all = self.accelerator.gather(torch.stack([*first_bad.values()]).unsqueeze(0))
        step, what = min(zip(of_all.amin(0).tolist(), first_bad, strict=True))
        if step < math.inf:
            raise FloatingPointError(
                f"the {what} NaN or infinite at step {step:.0f} (learning rate {self._learning_rate():.3g}); "
                f"{self._last_good_checkpoint()}. Start from its weights, or again, with a lower learning_rate, more "
                "warmup_steps or a lower max_grad_norm"
            )

    def _learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _last_good_checkpoint(self) -> str:
        try:
            return f"the last good checkpoint is {last_checkpoint(self.args.output_dir, self.args.save_only_model)}"
        except ValueError:
            return "there is no good checkpoint"


class TimedTrainer(SafeTrainer):
    """`SafeTrainer` that logs the speed of training on rows of tokens, `input_ids` [batch, seq].

    `tokens_per_second` counts all processes, and excludes evaluation and saving; `mfu` is the share of the devices'
    peak FLOP/s that is used (see `training_flops_per_token`).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._timed_tokens = 0

    @cached_property
    def _peak_flops(self) -> float:
        return peak_flops(self.args.device)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        if self._timed_tokens == 0:
            self._timer_start = time.perf_counter()
        tokens = inputs["input_ids"].numel()
        self._timed_tokens += tokens
        self._sequence_length = inputs["input_ids"].shape[-1]
        self._predicted_share = inputs.get("num_predictions", tokens) / tokens
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self._timed_tokens:
            speed = self._timed_tokens / (time.perf_counter() - self._timer_start)
            flops = training_flops_per_token(self.model, self._sequence_length, self._predicted_share)
            logs["tokens_per_second"] = round(speed * self.args.world_size)
            logs["mfu"] = speed * flops / self._peak_flops
            self._timed_tokens = 0
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        self._timed_tokens = 0
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args, **kwargs):
        self._timed_tokens = 0
        super().save_model(*args, **kwargs)


class EpochSetter(TrainerCallback):
    """Tells the data set which epoch begins: with several processes, accelerate tells the sampler only.

    Without it every epoch would have the masks of the first.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(state.epoch))


class PretrainingTrainer(TimedTrainer):
    """`Trainer` for masked and causal language models: every epoch has masks of its own, evaluation a `perplexity`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(EpochSetter)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if (loss := output.metrics.get(f"{metric_key_prefix}_loss")) is not None:
            output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        return output
