"""A loss or a weight that is NaN or infinite ends the run, before it is saved, and names what to go back to."""

import math
import re

import pytest
import torch
import transformers
from transformers import TrainerCallback

from shared_bert import SharedBertForMaskedLM
from shared_bert.training import PretrainingArguments
from shared_bert.training.trainer import PretrainingTrainer

from ..conftest import tiny_config
from ..training.runs import SCRIPT, SHAPE, run, write_recipe
from ..training.test_healing import heal_here, pair
from ..training.test_pretraining import run_here


class Poison(TrainerCallback):
    """Makes a weight infinite when a step begins or ends."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.poison)

    def poison(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters())[0, 0] = math.inf


@pytest.fixture
def poison(monkeypatch):
    def poison(event, step):
        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, Poison(event, step)]
        monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", callbacks)

    return poison


@pytest.mark.parametrize(
    ("event", "step", "saved", "what", "at"),
    [
        # No step is logged: it is the checkpoint that is not written, or the end.
        ("on_step_begin", 4, "checkpoint-3", "the loss is", 5),
        ("on_step_end", 6, "checkpoint-3", "the weights are", 6),
        ("on_step_end", 7, "checkpoint-6", "the loss is", 8),
    ],
)
def test_a_run_stops_before_it_saves(tmp_path, poison, event, step, saved, what, at):
    poison(event, step)
    message = rf"{what} NaN or infinite at step {at} \(learning rate .*\); the last .* is .*{saved}\. "
    with pytest.raises(FloatingPointError, match=message):
        run_here(tmp_path, max_steps=8, save_steps=3, logging_steps=100)
    assert not (tmp_path / "run" / "config.json").exists()
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == saved
    assert all(p.isfinite().all() for p in SharedBertForMaskedLM.from_pretrained(last).parameters())


def test_it_stops_when_it_logs(tmp_path, poison):
    poison("on_step_begin", 2)
    with pytest.raises(FloatingPointError, match=r"at step 3 \(learning rate .*\); there is no good checkpoint"):
        run_here(tmp_path, max_steps=100, save_steps=100, logging_steps=4)


def test_healing_stops_too(tmp_path, poison):
    poison("on_step_begin", 4)
    with pytest.raises(FloatingPointError, match=r"at step 5 .* the last good checkpoint is .*checkpoint-3"):
        heal_here(tmp_path, *pair(SharedBertForMaskedLM), max_steps=8, save_steps=3, logging_steps=100)


def test_losses_are_not_waited_for(tmp_path, monkeypatch):
    """On a GPU, reading a tensor waits for it: between logs, no step may read the loss."""
    arguments = PretrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1)
    assert not arguments.logging_nan_inf_filter
    trainer = PretrainingTrainer(model=SharedBertForMaskedLM(tiny_config("bert")), args=arguments)
    monkeypatch.setattr("transformers.Trainer.training_step", lambda *args, **kwargs: torch.empty((), device="meta"))
    trainer._first_bad_step = trainer._first_bad_step.to("meta")  # has no value that could be read
    trainer.training_step(trainer.model, {"input_ids": torch.ones(2, 8, dtype=torch.long)})


@pytest.mark.slow
def test_an_absurd_learning_rate_is_told_in_one_line(tmp_path):
    path = write_recipe(tmp_path, learning_rate=1e30, lr_scheduler_type="constant", logging_steps=5)
    process = run(SCRIPT, path)
    assert process.returncode == 2
    line = process.stderr.splitlines()[-1]
    assert line.startswith("pretrain.py: the loss is NaN or infinite at step ")
    assert "(learning rate 1e+30); there is no good checkpoint. Start" in line
    assert "Traceback" not in process.stderr


# The loss of the second of two processes is no number at step 7.
ONE_OF_TWO = """
import os, sys
from shared_bert.command_line import reports_user_errors
from shared_bert.training import PretrainingTrainer, parse_recipe, pretrain

class Diverging(PretrainingTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if (os.environ["RANK"], self.state.global_step) == ("1", 6) else loss

sys.modules["shared_bert.training.pretraining"].PretrainingTrainer = Diverging

@reports_user_errors
def main(arguments):
    pretrain(*parse_recipe(arguments))

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    script = tmp_path / "diverging.py"
    script.write_text(ONE_OF_TWO)
    path = write_recipe(tmp_path, config_overrides=SHAPE, logging_steps=4, per_device_train_batch_size=4)
    process = run(script, path, processes=2)
    assert process.returncode != 0
    expected = rf"the loss is NaN or infinite at step 7 \(learning rate .*\); the last good checkpoint is {tmp_path}"
    assert len(re.findall(expected, process.stderr)) == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
