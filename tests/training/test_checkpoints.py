"""Only whole checkpoints are resumed, and no run is overwritten unasked."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from shared_bert.training import last_checkpoint
from shared_bert.training.checkpoints import checkpoint_damage, checkpoint_to_resume, remove_run

from ..conftest import tiny_model


def write_checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"weight": torch.ones(1000)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(1000)}, path / name)
    return path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_newest_by_step(tmp_path):
    for step in (5, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


FILES = ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_passed_over_aloud(tmp_path, caplog, name, damage):
    whole = write_checkpoint(tmp_path, 5)
    broken = write_checkpoint(tmp_path, 10)
    if name == "trainer_state.json":
        (broken / name).write_text(json.dumps({"global_step": list(range(1000))}))
    damage(broken / name)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == str(whole)
    assert str(broken) in caplog.text
    assert name.split(".")[0] in caplog.text or "*.safetensors" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-10.*cannot be resumed"):
        checkpoint_to_resume(str(tmp_path), str(broken), overwrite=False)


def test_a_checkpoint_of_only_a_model_is_whole_without_the_optimizer(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    (path / "optimizer.pt").unlink()
    assert checkpoint_damage(path) == "optimizer* is missing"
    assert checkpoint_damage(path, only_model=True) is None
    truncate(path / "model.safetensors")
    assert "model.safetensors is damaged" in checkpoint_damage(path, only_model=True)


def test_a_missing_shard_is_named(tmp_path):
    path = write_checkpoint(tmp_path, 5)
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-2.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_damage(path) == "model-2.safetensors is missing"


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        checkpoint_to_resume(str(tmp_path), "true", overwrite=False)
    with pytest.raises(ValueError, match="it is not a folder"):
        checkpoint_to_resume(str(tmp_path), str(tmp_path / "absent"), overwrite=False)


def test_what_may_be_the_users_own_stays(tmp_path):
    own = ["README.md", "__init__.py", "attention.py", "my_model.py", "train.py"]
    for name in (*own, "run.json", "run.json.unfinished"):
        (tmp_path / name).touch()
    tiny_model("bert").save_pretrained(tmp_path)
    (tmp_path / "attention.py").write_text("# the user's own")
    assert (tmp_path / "modeling_shared_bert.py").stat().st_size > 0
    assert (tmp_path / "losses.py").stat().st_size > 0
    remove_run(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == own


@pytest.mark.parametrize("name", ["README.md", "train.py", "modeling_shared_bert.py", "run.json", "checkpoint-5"])
def test_no_mark_of_another_run(tmp_path, name):
    """The last two are what a run leaves that was killed before its first checkpoint was whole."""
    if name == "checkpoint-5":
        (write_checkpoint(tmp_path, 5) / "trainer_state.json").unlink()
    else:
        (tmp_path / name).touch()
    assert checkpoint_to_resume(str(tmp_path), None, overwrite=False) is None


def test_another_run_is_kept_unless_asked(tmp_path):
    write_checkpoint(tmp_path, 5)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds another run.*checkpoint-5"):
        checkpoint_to_resume(str(tmp_path), None, overwrite=False)
    assert checkpoint_to_resume(str(tmp_path), True, overwrite=False) == str(tmp_path / "checkpoint-5")
    assert checkpoint_to_resume(str(tmp_path), None, overwrite=True) is None
    remove_run(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert checkpoint_to_resume(str(tmp_path), False, overwrite=False) is None
