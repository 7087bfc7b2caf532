"""A killed run goes on as if nothing had happened, and leaves no half-written checkpoint."""

import json
import signal

import pytest

from shared_bert.training import last_checkpoint

from .runs import ROOT, losses, run, write_recipe

pytestmark = pytest.mark.slow

# `pretrain`, killed at the step and at the moment that the environment names.
KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from shared_bert.training import PretrainingTrainer, parse_recipe, pretrain

class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ.get("KILL_AT_STEP", -1)):
            os.kill(os.getpid(), signal.SIGKILL)

class KilledTrainer(PretrainingTrainer):
    def __init__(self, **kwargs):
        super().__init__(callbacks=[Killer()], **kwargs)

    def _save_rng_state(self, output_dir):
        if self.state.global_step == int(os.environ.get("KILL_IN_CHECKPOINT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)

sys.modules["shared_bert.training.pretraining"].PretrainingTrainer = KilledTrainer
pretrain(*parse_recipe(sys.argv[1:]))
"""


@pytest.fixture
def killed_script(tmp_path):
    path = tmp_path / "killed.py"
    path.write_text(KILLED)
    return path


def test_resumption_is_exact(tmp_path, killed_script):
    # The epochs are so short that the run is resumed in the middle of one that is not the first.
    changes = {
        "max_steps": 12,
        "gradient_accumulation_steps": 2,
        "max_train_samples": 6,
        "per_device_train_batch_size": 3,
    }
    path = write_recipe(tmp_path, eval_strategy="steps", eval_steps=3, **changes)
    whole = run(killed_script, path, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    killed = run(killed_script, path, KILL_AT_STEP="7")
    assert killed.returncode == -signal.SIGKILL
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    epoch = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())["epoch"]
    assert epoch > 1
    assert epoch % 1
    resumed = run(killed_script, path, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    expected = losses(tmp_path / "whole")
    assert len(set(expected.values())) == 12
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-4)
    metrics = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("whole", "run")]
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-4)
    for process in (whole, resumed):
        assert "FutureWarning" not in process.stderr
        assert "DeprecationWarning" not in process.stderr


def test_a_checkpoint_cut_off_is_not_taken(tmp_path, killed_script):
    path = write_recipe(tmp_path)
    killed = run(killed_script, path, KILL_IN_CHECKPOINT="10")
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-10" / "model.safetensors").exists()
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-5")
    refused = run(ROOT / "scripts" / "pretrain.py", path)
    assert "holds another run" in refused.stderr
    resumed = run(ROOT / "scripts" / "pretrain.py", path, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-10")
    assert set(losses(tmp_path / "run")) == set(range(1, 11))
    # All steps are done: nothing is left but to evaluate and save.
    finished = run(ROOT / "scripts" / "pretrain.py", path, "--resume_from_checkpoint", "true")
    assert finished.returncode == 0, finished.stderr
    assert set(losses(tmp_path / "run")) == set(range(1, 11))
