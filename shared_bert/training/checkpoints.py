"""Checkpoints and output folders: finding whole ones, removing an old run, publishing a trained model."""

import json
import logging
import pickle
import shutil
from collections.abc import Iterable, Iterator
from filecmp import cmp
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import CONFIG_NAME

from .. import modeling

logger = logging.getLogger(__name__)

# A trained model is written here and moved out when it is whole.
UNFINISHED = "_unfinished"
# The files of a run outside its checkpoints: they are removed with the run, and any of them marks a folder as taken.
# The config goes first: without it, what an interrupted removal leaves is not a model.
_RUN_FILES = (
    "config.json", "model*.safetensors*", "pytorch_model*.bin*", "generation_config.json", "tokenizer*.json",
    "special_tokens_map.json", "vocab.*", "training_args.bin", "trainer_state.json", "*_results.json", "loss_curve.*",
)  # fmt: skip
# Removed with a run, but not marks of one: they are written before there is anything to resume from. Code and
# README.md may be the user's own and stay, unless the code is the copy of the model's that is saved with it.
_REMOVED_TOO = ("run.json*", UNFINISHED)
_MODEL_CODE = sorted(Path(modeling.__file__).parent.glob("[!_]*.py"))
# Trainer writes the first of them last: a checkpoint without it is incomplete.
_NEEDED = (TRAINER_STATE_NAME, "model*.safetensors")
_NEEDED_TO_RESUME = ("optimizer*", "scheduler.pt", "rng_state*.pth")  # not written with save_only_model


def checkpoint_damage(folder: str | Path, only_model: bool = False) -> str | None:
    """Return why training cannot resume from `folder`, or None; no weights are read.

    Pickles must contain tensors and numbers only, as `torch.load(weights_only=True)` checks without running any code,
    except `training_args.bin`, which is not read.

    Args:
        only_model: whether it was written with `save_only_model`, so that only its model has to be whole.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "it is not a folder"
    for pattern in _NEEDED if only_model else (*_NEEDED, *_NEEDED_TO_RESUME):
        if not any(folder.glob(pattern)):
            return f"{pattern} is missing"
    return next(_damaged_files(folder), None)


def _damaged_files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if path.name.endswith(".safetensors.index.json"):
                    for shard in sorted(set(content["weight_map"].values())):
                        if not (folder / shard).is_file():
                            yield f"{shard} is missing"
            elif path.suffix == ".safetensors":
                # The header states the length of the file.
                with safe_open(path, framework="numpy"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and path.name != TRAINING_ARGS_NAME:
                # The meta device has no memory: only the table of contents and the pickle are read.
                with safe_globals():
                    torch.load(path, map_location="meta", mmap=True, weights_only=True)
        except (ValueError, OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            yield f"{path.name} is damaged or contains more than tensors ({error})".splitlines()[0]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest step first."""
    folders = (path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit())
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def finished_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders that were written to the end, oldest step first."""
    return [path for path in checkpoints(output_dir) if (path / TRAINER_STATE_NAME).exists()]


def last_checkpoint(output_dir: str | Path, only_model: bool = False) -> str:
    """Return the newest whole checkpoint of a run; warn of each newer one that is skipped.

    Args:
        only_model: see `checkpoint_damage`.

    Raises:
        ValueError: there is none.
    """
    for folder in reversed(checkpoints(output_dir)):
        damage = checkpoint_damage(folder, only_model)
        if damage is None:
            return str(folder)
        logger.warning("%s is skipped: %s", folder, damage)
    raise ValueError(f"output_dir={str(output_dir)!r} holds no whole checkpoint to resume from")


def checkpoint_to_resume(output_dir: str, resume_from_checkpoint: str | bool | None, overwrite: bool) -> str | None:
    """Return the checkpoint that a run starts from; None for a new run, for which `output_dir` must be free.

    Args:
        resume_from_checkpoint: true for the newest whole checkpoint of `output_dir`, else a checkpoint's folder.
        overwrite: whether `output_dir` may hold another run.

    Raises:
        ValueError: there is nothing to resume, a checkpoint is damaged, or the folder holds another run.
    """
    choice = str(resume_from_checkpoint or False)
    if choice.lower() == "true":
        return last_checkpoint(output_dir)
    if choice.lower() != "false":
        if damage := checkpoint_damage(choice):
            raise ValueError(f"resume_from_checkpoint={choice!r} cannot be resumed: {damage}")
        if Path(choice).resolve().parent == Path(output_dir).resolve():
            return choice
    if Path(output_dir).is_file():
        raise ValueError(f"output_dir={output_dir!r} is a file: name a folder")
    if not overwrite and (found := [*finished_checkpoints(output_dir), *_matching(output_dir, _RUN_FILES)]):
        raise ValueError(
            f"output_dir={output_dir!r} holds another run ({found[0].name}): continue it with "
            "resume_from_checkpoint=true, replace it with overwrite_output_dir=true, or name another folder"
        )
    return None if choice.lower() == "false" else choice


def remove_run(output_dir: str):
    """Delete the files of `Trainer` and `pretrain` in a folder; others stay."""
    copies = [
        path for code in _MODEL_CODE if (path := Path(output_dir, code.name)).is_file() and cmp(path, code, False)
    ]
    for path in [*checkpoints(output_dir), *_matching(output_dir, (*_RUN_FILES, *_REMOVED_TOO)), *copies]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _matching(output_dir: str, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in sorted(Path(output_dir).glob(name))]


def publish(unfinished: Path, folder: Path):
    """Move a saved model from `unfinished` into `folder`, its config last: without one a folder is not a model."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    config = unfinished / CONFIG_NAME
    for path in [*(path for path in unfinished.rglob("*") if path.is_file() and path != config), config]:
        target = folder / path.relative_to(unfinished)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(unfinished)
