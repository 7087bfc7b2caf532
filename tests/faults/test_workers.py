"""A process that dies takes the whole run with it, aloud; and the run goes on when it is started again."""

import re

import pytest

from ..training.runs import ROOT, losses, run, write_recipe

pytestmark = pytest.mark.slow

# `pretrain`, in which one process kills itself: while the first one packs, or at the seventh step.
DYING = """
import os, signal, sys
from shared_bert.training import PretrainingTrainer, parse_recipe, pretrain

pretraining = sys.modules["shared_bert.training.pretraining"]

def die(moment):
    if os.environ.get("DIES") == f"{os.environ['RANK']} {moment}":
        os.kill(os.getpid(), signal.SIGKILL)

class Dying(PretrainingTrainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 6:
            die("training")
        return super().training_step(*args, **kwargs)

def pack_split(*args):
    die("packing")
    return plain_pack_split(*args)

plain_pack_split, pretraining.pack_split = pretraining.pack_split, pack_split
pretraining.PretrainingTrainer = Dying
pretrain(*parse_recipe(sys.argv[1:]))
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/ddp_2cpu.yaml"]


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    path = write_recipe(tmp_path, per_device_train_batch_size=4)

    def launch(launcher, *options, dies=""):
        return run(*launcher, script, path, *options, DIES=dies)

    return launch


@pytest.mark.parametrize(
    ("launcher", "dies"),
    [(ACCELERATE, "1 training"), (TORCHRUN, "0 training"), (TORCHRUN, "0 packing"), (TORCHRUN, "1 packing")],
    ids=["accelerate-1-training", "torchrun-0-training", "torchrun-0-packing", "torchrun-1-packing"],
)
def test_a_run_whose_process_dies_ends(tmp_path, launch, launcher, dies):
    process = launch(launcher, dies=dies)
    assert process.returncode not in (0, None)
    rank = dies.split()[0]
    assert re.search(rf"local_rank: {rank}\b", process.stderr)
    assert "SIGKILL" in process.stderr
    whole = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert whole == (["checkpoint-5"] if "training" in dies else [])


def test_it_goes_on(tmp_path, launch):
    whole = launch(TORCHRUN, "--output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert launch(TORCHRUN, dies="1 training").returncode != 0
    resumed = launch(TORCHRUN, "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
