"""A process that dies takes the whole run with it, aloud; and the run goes on when it is started again."""

import os
import re
import subprocess
import sys

import pytest

from ..conftest import NO_DROPOUT
from ..processes import launcher_environment
from ..training.runs import SHAPE, losses, run, write_recipe
from ..training.test_pretraining import run_here

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

def pack_documents(*args):
    die("packing")
    return plain_pack_documents(*args)

plain_pack_documents, pretraining.pack_documents = pretraining.pack_documents, pack_documents
pretraining.PretrainingTrainer = Dying
pretrain(*parse_recipe(sys.argv[1:]))
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture
def launch(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    path = write_recipe(tmp_path, per_device_train_batch_size=4, config_overrides=SHAPE | NO_DROPOUT)

    def launch(*options, dies="", launcher=None):
        if launcher is None:
            process = run(script, path, *options, processes=2, DIES=dies, **launcher_environment("ddp_2cpu.yaml"))
        else:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIES": dies}
            command = [sys.executable, *launcher, script, path, *options]
            process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert re.search(rf"local_rank: {dies.split()[0]}\b", process.stderr)
            assert "SIGKILL" in process.stderr
        assert (process.returncode != 0) == bool(dies), process.stderr
        return [path.name for path in (tmp_path / "run").glob("checkpoint-*")]

    return launch


def test_a_run_whose_second_process_dies_goes_on(tmp_path, launch):
    assert launch(dies="1 training") == ["checkpoint-5"]
    launch("--resume_from_checkpoint", "true")
    whole = losses(tmp_path / "run")
    run_here(tmp_path, config_overrides=SHAPE | NO_DROPOUT, output_dir=str(tmp_path / "single"))
    assert whole == pytest.approx(losses(tmp_path / "single"), abs=1e-4)


def test_nobody_waits_for_a_first_process_that_died(launch):
    assert launch(dies="0 packing", launcher=TORCHRUN) == []
