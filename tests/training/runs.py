"""Tiny pre-training runs for the tests: text, arguments, and runs in processes of their own."""

import json
import os
import random
import subprocess
from pathlib import Path

import yaml

from ..processes import run_python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "pretrain.py"
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
MASA = {**SHAPE, "depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo"}


def write_text(path: Path, num_documents: int = 120) -> Path:
    """Sentences in which the next word depends on the last, so that there is something to learn."""
    generator = random.Random(0)
    nouns = ["fox", "dog", "owl", "cat", "hen", "cow", "pig", "rat"]
    verbs = {"fox": "hunts", "dog": "barks", "owl": "sees", "cat": "naps", "hen": "lays"}
    lines = []
    for _ in range(num_documents):
        chosen = [generator.choice(nouns) for _ in range(20)]
        lines.append(" ".join(f"the {noun} {verbs.get(noun, 'stands')} ." for noun in chosen))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def recipe(folder: Path, model_type: str = "shared_bert", **changes) -> dict:
    """The keys of a run of ten steps in about a second, in `folder`."""
    return {
        "model_type": model_type,
        "config_overrides": dict(SHAPE),
        "tokenizer_vocab_size": 320,
        "train_file": str(write_text(folder / "text.txt")),
        "sample_by": "line",
        "validation_split": 0.1,
        "block_size": 32,
        "output_dir": str(folder / "run"),
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 5,
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def write_recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **changes)), encoding="utf-8")
    return path


def run(*command, processes: int = 1, timeout: int = 120, **environment) -> subprocess.CompletedProcess:
    """Run `python *command` in processes of their own, with an empty cache."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return run_python(*command, environment=environment, processes=processes, timeout=timeout)


def losses(output_dir: Path) -> dict[int, float]:
    """The training loss after each step."""
    curve = json.loads(Path(output_dir, "loss_curve.json").read_text())
    return {point["step"]: point["loss"] for point in curve["train"]}


# Healing that is killed after the step that the environment names.
KILLED_HEALING = """
import os, signal
from transformers import TrainerCallback
from shared_bert.training import healing

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("KILL_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

class KilledTrainer(healing.HealingTrainer):
    def __init__(self, **kwargs):
        super().__init__(callbacks=[Killer()], **kwargs)

healing.HealingTrainer = KilledTrainer
"""
