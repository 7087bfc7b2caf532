"""A full disk: the run says so and where, its last good checkpoint stays, and it goes on when there is room."""

import subprocess

import pytest

from ..training.runs import SHAPE, write_recipe, write_text
from . import jobs
from .processes import assert_same, run_job

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "config_overrides": SHAPE}


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run on a disk with room."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe, places = write_recipe(folder, **SHORT), {"log": folder / "log.txt", "cache": folder / "cache"}
    assert run_job(jobs.run_script, "pretrain.py", recipe, **places)[0] == 0, places["log"].read_text()
    return folder / "run"


# A checkpoint takes some 700 kB, a trained model some 200 kB.
@pytest.mark.parametrize("room", [0, 150_000])
def test_a_checkpoint_that_does_not_fit(small_disk, places, undisturbed, room):
    recipe = write_recipe(small_disk, **SHORT)
    status, _ = run_job(jobs.run_pretraining_until_the_disk_is_full, recipe, "on_step_end", 3, room, **places)
    assert status == 2
    output = small_disk / "run"
    line = places["log"].read_text().splitlines()[-1]
    assert line.startswith(f"pretrain.py: {output}/checkpoint-4 could not be written (")
    assert line.endswith(f"the last good checkpoint is {output}/checkpoint-2")
    assert "MiB are free on its disk" in line
    assert [path.name for path in output.iterdir() if path.is_dir()] == ["checkpoint-2"]

    (small_disk / "filler").unlink()
    assert run_job(jobs.run_script, "pretrain.py", recipe, "--resume_from_checkpoint", "true", **places)[0] == 0
    assert_same(output, undisturbed)


def test_a_trained_model_that_does_not_fit(small_disk, places):
    recipe = write_recipe(small_disk, **SHORT)
    arguments = (jobs.run_pretraining_until_the_disk_is_full, recipe, "on_train_end", 6, 100_000)
    assert run_job(*arguments, **places)[0] == 2
    output = small_disk / "run"
    line = places["log"].read_text().splitlines()[-1]
    assert line.startswith(f"pretrain.py: {output} could not be written (")
    assert line.endswith(f"the last good checkpoint is {output}/checkpoint-6")
    assert not (output / "config.json").exists()
    (small_disk / "filler").unlink()
    assert run_job(jobs.run_script, "pretrain.py", recipe, "--resume_from_checkpoint", "true", **places)[0] == 0
    assert_same(output, output / "checkpoint-6")


def test_a_conversion_that_does_not_fit(small_disk, places, stock):
    jobs.fill_disk(small_disk, 100_000)
    arguments = ["from-stock", stock, small_disk / "out"]
    assert run_job(jobs.run_script, "convert.py", *arguments, **places)[0] == 2
    assert f"convert.py: {small_disk}/out could not be written (" in places["log"].read_text()
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_a_cache_that_does_not_fit(tmp_path, small_disk, places):
    (small_disk / "cache").mkdir()
    recipe = write_recipe(tmp_path, **{**SHORT, "train_file": str(write_text(tmp_path / "long.txt", 4000))})
    jobs.fill_disk(small_disk, 1_000_000)
    places["cache"] = small_disk / "cache"
    assert run_job(jobs.run_script, "pretrain.py", recipe, **places)[0] == 2
    assert "No space left on device" in places["log"].read_text().splitlines()[-1]
    assert not (tmp_path / "run").exists()
    (small_disk / "filler").unlink()
    assert run_job(jobs.run_script, "pretrain.py", recipe, **places)[0] == 0
    whole = {**places, "cache": tmp_path / "cache"}
    assert run_job(jobs.run_script, "pretrain.py", recipe, "--output_dir", tmp_path / "whole", **whole)[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
