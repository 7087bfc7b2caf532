"""The record of a run in its folder: its text, its options and its versions, which the model card shows."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .arguments import RunArguments

RUN_RECORD = "run.json"
_TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "bf16", "seed",
)  # fmt: skip


class RunRecorder(TrainerCallback):
    """Writes `run.json` into the output folder when training begins, without tokens or paths other than the data's.

    Args:
        kind: "pre-training", "healing" or "fine-tuning".
        data: names of the data and options of its preparation.
        block_size: tokens per row; None where rows differ.
    """

    def __init__(self, kind: str, data: dict[str, Any], block_size: int | None):
        self.kind = kind
        self.data = data
        self.block_size = block_size

    def on_train_begin(self, args: RunArguments, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        record = {
            "kind": self.kind,
            "data": self.data,
            "block_size": self.block_size,
            "tokens_per_step": None if self.block_size is None else rows * self.block_size,
            "training": {name: getattr(args, name) for name in _TRAINING},
            "versions": {name: version(name) for name in ("shared_bert", "transformers", "torch")},
        }
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        whole = Path(args.output_dir, f"{RUN_RECORD}.unfinished")
        whole.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        whole.replace(Path(args.output_dir, RUN_RECORD))
