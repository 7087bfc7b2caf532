"""The benchmark compares like with like, and its numbers hang together."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from shared_bert.evaluation import StepSettings, TrainingStep, compare_training_steps
from tests.conftest import TINY

SHAPE = tuple(TINY.items())
MASA = (("depth_sharing", "masa"), ("num_atoms", 1), ("depth_shared_matrices", "qkvo"))


@pytest.mark.parametrize(("task", "scheme"), [("mlm", "shared"), ("clm", "query_free")])
def test_both_models_are_of_one_shape_and_learn(task, scheme):
    settings = StepSettings(task, 2, 16, scheme, model_fields=SHAPE)
    stock, shared = TrainingStep(replace(settings, attention_scheme=None)), TrainingStep(settings)
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
    stock, shared = TrainingStep(replace(settings, attention_scheme=None)), TrainingStep(settings)
    for step in (stock, shared):
        step.model.config.attention_probs_dropout_prob = 0.0
        step.model.eval()
    shared.model.load_state_dict(stock.model.state_dict())
    assert shared() == pytest.approx(stock(), rel=1e-5)


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_depth_sharing_is_measured_against_the_same_model_without(task):
    own = StepSettings(task, 2, 16, "standard", model_fields=SHAPE)
    steps = [TrainingStep(settings) for settings in (own, replace(own, model_fields=(*SHAPE, *MASA)))]
    for name, value in steps[0].batch.items():
        assert torch.equal(torch.as_tensor(steps[1].batch[name]), torch.as_tensor(value))
    counts = [step.model.num_parameters() for step in steps]
    assert counts[0] - counts[1] == 4 * 32 * 32 - 4 * 2  # of two layers one atom each is left, and two coefficients
    for step in steps:
        losses = [step() for _ in range(60)]
        assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_the_result_is_consistent():
    settings = StepSettings("mlm", 2, 16, "shared", model_fields=SHAPE)
    compared = {"stock": replace(settings, attention_scheme=None), "shared": settings}
    row = compare_training_steps(compared, rounds=3, warmup=1)
    seconds = row["seconds_per_step"]
    assert row["speedup"] == seconds["stock"] / seconds["shared"]
    assert row["tokens_per_second"]["shared"] == pytest.approx(32 / seconds["shared"])
    assert min(row["peak_memory_bytes"].values()) > 0


@pytest.mark.slow
def test_the_overhead_of_depth_sharing_is_written_down(tmp_path):
    output = tmp_path / "depth.json"
    fields = ",".join(f"{name}={value}" for name, value in SHAPE)
    sharing = "depth_sharing=masa,num_atoms=2,coefficient_source=network"
    run = subprocess.run(
        [
            *(sys.executable, "scripts/benchmark.py", "depth", "--shapes", "2x16", "--rounds", "1"),
            *("--model_fields", fields, "--sharing", sharing, "--output", output),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(output.read_text())["results"]
    seconds = row["seconds_per_step"]
    assert row["overhead"] == pytest.approx(seconds["shared"] / seconds["own"] - 1)
    assert dict(row["settings"]["shared"]["model_fields"])["depth_sharing"] == "masa"
    assert "depth_sharing" not in dict(row["settings"]["own"]["model_fields"])
    assert f"{row['overhead']:.1%}" in run.stdout


@pytest.mark.slow
def test_decoding_is_written_down(tmp_path):
    output = tmp_path / "decode.json"
    fields = ",".join(f"{name}={value}" for name, value in SHAPE)
    run = subprocess.run(
        [
            *(sys.executable, "scripts/benchmark.py", "decode", "--shapes", "2x5", "--rounds", "3"),
            *("--new_tokens", "4", "--model_fields", fields),
            *("--sharing", "depth_sharing=masa,num_atoms=1", "--output", output),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(output.read_text())["results"]
    seconds = row["seconds_per_token"]
    assert row["speedup"] == pytest.approx(seconds["own"] / seconds["shared"])
    assert dict(row["settings"]["shared"]["model_fields"])["num_atoms"] == 1
    assert f"{row['speedup']:.2f}x" in run.stdout


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
