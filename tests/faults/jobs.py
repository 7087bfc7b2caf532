"""What is killed: pre-training, conversion and healing, each started as one starts it again after it was cut off."""

import runpy
from pathlib import Path

from shared_bert.training import DataArguments, ModelArguments, PretrainingArguments, pretrain
from shared_bert.training.checkpoints import checkpoint_damage, checkpoints

CONVERT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "convert.py"))["main"]


def is_whole(checkpoint: Path) -> bool:
    return checkpoint_damage(checkpoint) is None


def run_pretraining(keys: dict):
    """Goes on from the last whole checkpoint, or begins anew where there is none."""
    goes_on = any(map(is_whole, checkpoints(keys["output_dir"])))
    keys = {**keys, **({"resume_from_checkpoint": "true"} if goes_on else {"overwrite_output_dir": True})}
    dataclasses = (ModelArguments, DataArguments, PretrainingArguments)
    pretrain(*(cls(**{name: keys[name] for name in keys if name in cls.__dataclass_fields__}) for cls in dataclasses))


def run_conversion(model: Path, output: Path, *options: str):
    if not output.exists():
        assert CONVERT(["from-stock", str(model), str(output), *options]) == 0


def run_healing(model: Path, output: Path, *options: str):
    restart = ["--resume_from_checkpoint", "true"] if output.exists() else []
    assert CONVERT(["from-stock", str(model), str(output), *options, *restart]) == 0
