"""The benchmark compares like with like, and its numbers hang together."""

import json
import subprocess
import sys

import pytest
import torch

from shared_bert.evaluation import StepSettings, TrainingStep, compare_training_steps
from tests.conftest import TINY

SHAPE = tuple(TINY.items())


@pytest.mark.parametrize(("task", "scheme"), [("mlm", "shared"), ("clm", "query_free")])
def test_both_models_are_of_one_shape_and_learn(task, scheme):
    settings = StepSettings(task, 2, 16, scheme, model_fields=SHAPE)
    stock, shared = TrainingStep(settings, stock=True), TrainingStep(settings, stock=False)
    assert torch.equal(stock.batch["input_ids"], shared.batch["input_ids"])
    assert torch.equal(stock.batch["labels"], shared.batch["labels"])
    saved = 2 * 32 * 32 + 2 * 32 - 3 * 32 if scheme == "shared" else 32 * 32 + 32
    assert stock.model.num_parameters() - shared.model.num_parameters() == TINY["num_hidden_layers"] * saved
    for step in (stock, shared):
        losses = [step() for _ in range(60)]
        assert losses[-1] < losses[0] - 0.1


def test_the_same_attention_gives_the_same_step():
    """With ``standard`` and the stock model's weights, the measured step computes the stock loss."""
    settings = StepSettings("mlm", 2, 16, "standard", model_fields=(*SHAPE, ("hidden_dropout_prob", 0.0)))
    stock, shared = TrainingStep(settings, stock=True), TrainingStep(settings, stock=False)
    for step in (stock, shared):
        step.model.config.attention_probs_dropout_prob = 0.0
        step.model.eval()
    shared.model.load_state_dict(stock.model.state_dict())
    assert shared() == pytest.approx(stock(), rel=1e-5)


@pytest.mark.slow
def test_the_result_is_consistent():
    row = compare_training_steps(StepSettings("mlm", 2, 16, "shared", model_fields=SHAPE), rounds=3, warmup=1)
    seconds = row["seconds_per_step"]
    assert row["speedup"] == seconds["stock"] / seconds["shared"]
    assert row["tokens_per_second"]["shared"] == pytest.approx(32 / seconds["shared"])
    assert min(row["peak_memory_bytes"].values()) > 0


def test_a_wrong_option_is_named():
    run = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "train", "--scheme", "sharde"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "sharde" in run.stderr
    assert "shared_kv" in run.stderr


def test_the_kept_results_name_where_they_come_from(pytestconfig):
    for path in (pytestconfig.rootpath / "model_cards").glob("benchmark_train*.json"):
        kept = json.loads(path.read_text())
        assert kept.keys() >= {"commit", "hardware", "torch", "transformers", "results"}
