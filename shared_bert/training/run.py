"""A run of training, from its first checkpoint to the saved model, its metrics and its loss curve."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..modeling import SharedAttentionConfig
from .arguments import RunArguments
from .checkpoints import checkpoint_to_resume, remove_run
from .loss_curve import save_loss_curve
from .models import restore_use_cache
from .run_record import RunRecorder
from .trainer import SafeTrainer, uses_fsdp


def starting_checkpoint(training_args: RunArguments) -> str | None:
    """Return the checkpoint that a run starts from, or None for a new run.

    Raises:
        ValueError: see `checkpoint_to_resume`; a checkpoint of a run under FSDP that is resumed without, or the
            reverse.
    """
    checkpoint = checkpoint_to_resume(
        training_args.output_dir, training_args.resume_from_checkpoint, training_args.overwrite_output_dir
    )
    if checkpoint and Path(checkpoint, "optimizer.bin").exists() != uses_fsdp(training_args):
        raise ValueError(
            f"{checkpoint} was written {'without' if uses_fsdp(training_args) else 'under'} FSDP: launch the run as "
            "before, or start a new one from its weights with model_name_or_path"
        )
    return checkpoint


class _RunRemover(TrainerCallback):
    """Deletes the old run in `output_dir` when training begins, after all checks of the new one."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            remove_run(args.output_dir)


def run_training(
    trainer: SafeTrainer,
    checkpoint: str | None,
    kind: str,
    data: dict[str, Any],
    block_size: int | None = None,
    unigram_entropy: float | None = None,
    loss_name: str = "loss (nats per predicted token)",
) -> dict[str, float]:
    """Train, and write the model, its metrics, `run.json` and the loss curve into `output_dir`.

    Args:
        checkpoint: to resume from, or None.
        kind, data, block_size: for `run.json`; see `RunRecorder`.
        unigram_entropy, loss_name: see `save_loss_curve`.

    Returns:
        The metrics of training and of the final evaluation.
    """
    args, config = trainer.args, trainer.model.config
    if args.overwrite_output_dir:
        trainer.add_callback(_RunRemover)
    trainer.add_callback(RunRecorder(kind, data, block_size))
    if checkpoint and trainer.is_world_process_zero():
        print(f"resuming from {checkpoint}", flush=True)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    restore_use_cache(config)
    evaluation = trainer.finish(metrics)
    if trainer.is_world_process_zero():
        names = config.sharing_names if isinstance(config, SharedAttentionConfig) else [config.model_type]
        title = f"{type(trainer.model).__name__} ({', '.join(names)}), {kind}"
        save_loss_curve(args.output_dir, trainer.state.log_history, unigram_entropy, title, loss_name)
    return {**metrics, **evaluation}
