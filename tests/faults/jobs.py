"""What goes wrong: pre-training, conversion and healing, each started as one starts it again after it was cut off."""

import runpy
import shutil
import sys
from pathlib import Path

import transformers
from safetensors.torch import save_file

from shared_bert.data import load_documents, pack, train_tokenizer
from shared_bert.training import DataArguments, ModelArguments, PretrainingArguments, pretrain
from shared_bert.training.checkpoints import checkpoint_damage, checkpoints

SCRIPTS = {
    name: runpy.run_path(str(Path(__file__).parents[2] / "scripts" / name))["main"]
    for name in ("pretrain.py", "convert.py")
}


def is_whole(checkpoint: Path) -> bool:
    return checkpoint_damage(checkpoint) is None


def run_packing(text: Path, output: Path):
    """Packs text, and writes the blocks where a model's weights would be."""
    documents = load_documents(train_file=text, validation_file=text, sample_by="line")["train"]
    blocks = pack(documents, train_tokenizer("wordpiece", documents, 320, 32), 32)
    output.mkdir(exist_ok=True)
    save_file(blocks.with_format("torch")[:], output / "model.safetensors")


def run_pretraining(keys: dict):
    """Goes on from the last whole checkpoint, or begins anew where there is none."""
    goes_on = any(map(is_whole, checkpoints(keys["output_dir"])))
    keys = {**keys, **({"resume_from_checkpoint": "true"} if goes_on else {"overwrite_output_dir": True})}
    dataclasses = (ModelArguments, DataArguments, PretrainingArguments)
    pretrain(*(cls(**{name: keys[name] for name in keys if name in cls.__dataclass_fields__}) for cls in dataclasses))


def run_conversion(model: Path, output: Path, *options: str):
    if not output.exists():
        assert SCRIPTS["convert.py"](["from-stock", str(model), str(output), *options]) == 0


def run_healing(model: Path, output: Path, *options: str):
    restart = ["--resume_from_checkpoint", "true"] if output.exists() else []
    assert SCRIPTS["convert.py"](["from-stock", str(model), str(output), *options, *restart]) == 0


def run_script(name: str, *arguments):
    sys.exit(SCRIPTS[name]([*map(str, arguments)]))


def fill_disk(folder: Path, room: int):
    """Leaves `room` bytes on the disk of a folder."""
    with open(folder / "filler", "wb") as file:
        file.write(bytes(max(shutil.disk_usage(folder).free - room, 0)))


def run_pretraining_until_the_disk_is_full(recipe: Path, event: str, step: int, room: int, *options: str):
    """Fills the disk of `recipe` when Trainer tells of `event` at `step`."""

    class Filler(transformers.TrainerCallback):
        pass

    def fill(self, args, state, control, **kwargs):
        if state.global_step == step:
            fill_disk(recipe.parent, room)

    setattr(Filler, event, fill)
    transformers.trainer.DEFAULT_CALLBACKS.append(Filler)
    run_script("pretrain.py", recipe, *options)
