"""The benchmark compares like with like, and its numbers hang together."""

import json
import runpy
from dataclasses import replace

import pytest
import torch

from shared_bert.evaluation import StepSettings, TrainingStep, compare_training_steps, efficiency
from shared_bert.evaluation.efficiency import measure_alone
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
def test_memory_is_that_of_the_step_alone():
    settings = StepSettings("mlm", 2, 16, "shared", model_fields=tuple({**TINY, "hidden_size": 1024}.items()))
    parameters = TrainingStep(settings).model.num_parameters()
    held = torch.zeros(2**27)  # of the process that asks: not counted
    found = measure_alone(settings, TrainingStep, rounds=2)
    # Weights, gradients and two moments, half of them at least.
    assert 4 * 4 * parameters / 2 < found["peak_memory_bytes"] < held.numel() * 4
    assert found["seconds"] > 0


@pytest.fixture
def without_memory(monkeypatch):
    """Memory is measured in processes of its own, which take long to start."""
    monkeypatch.setattr(efficiency, "peak_memory", lambda settings: 1 + (settings.attention_scheme == "shared"))


def test_the_result_is_consistent(without_memory):
    settings = StepSettings("mlm", 2, 16, "shared", model_fields=SHAPE)
    compared = {"stock": replace(settings, attention_scheme=None), "shared": settings}
    row = compare_training_steps(compared, rounds=3, warmup=1)
    seconds = row["seconds"]
    assert row["speedup"] == seconds["stock"] / seconds["shared"]
    assert row["tokens_per_second"]["shared"] == pytest.approx(32 / seconds["shared"])
    assert row["peak_memory_bytes"] == {"stock": 1, "shared": 2}
    assert row["memory_ratio"] == 2


def run_script(pytestconfig, *arguments) -> int:
    return runpy.run_path(str(pytestconfig.rootpath / "scripts" / "benchmark.py"))["main"]([*map(str, arguments)])


def test_depth_sharing_is_compared_with_separate_layers(without_memory, pytestconfig, tmp_path, capsys):
    output = tmp_path / "masa.json"
    fields = ",".join(f"{name}={value}" for name, value in SHAPE)
    sharing = "depth_sharing=masa,num_atoms=2,coefficient_source=network"
    options = ["--task", "mlm", "--shapes", "2x16", "--rounds", "1", "--model_fields", fields, "--sharing", sharing]
    assert run_script(pytestconfig, "train", *options, "--output", output) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert dict(row["settings"]["shared"]["model_fields"])["depth_sharing"] == "masa"
    assert "depth_sharing" not in dict(row["settings"]["own"]["model_fields"])
    assert row["first_seconds"].keys() == {"own", "shared"}
    table = efficiency.speed_table([row])
    assert output.with_suffix(".md").read_text() == table
    assert table.splitlines()[2] in capsys.readouterr().out


def test_decoding_is_written_down(pytestconfig, tmp_path, capsys):
    output = tmp_path / "decode.json"
    fields = ",".join(f"{name}={value}" for name, value in SHAPE)
    options = ["--shapes", "2x5", "--rounds", "3", "--new_tokens", "4", "--model_fields", fields]
    options += ["--sharing", "depth_sharing=masa,num_atoms=1", "--output", output]
    assert run_script(pytestconfig, "decode", *options) == 0
    (row,) = json.loads(output.read_text())["results"]
    seconds = row["seconds"]
    assert row["speedup"] == pytest.approx(seconds["own"] / seconds["shared"])
    assert row["seconds_per_token"]["own"] == pytest.approx(seconds["own"] / 4)
    assert dict(row["settings"]["shared"]["model_fields"])["num_atoms"] == 1
    assert f"| {row['speedup']:.2f}× |" in capsys.readouterr().out


def test_a_wrong_option_is_named(pytestconfig, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_script(pytestconfig, "train", "--scheme", "sharde")
    error = capsys.readouterr().err
    assert "sharde" in error
    assert "shared_kv" in error


def test_the_kept_results_name_where_they_come_from(pytestconfig):
    for path in (pytestconfig.rootpath / "model_cards").glob("**/benchmark_*.json"):
        kept = json.loads(path.read_text())
        assert kept.keys() >= {"commit", "hardware", "torch", "transformers", "results"}
