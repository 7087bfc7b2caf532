"""The table counts what the models hold, stock first, and says what it measured."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from shared_bert.data.tasks import load_glue
from shared_bert.evaluation import efficiency_table as module
from shared_bert.evaluation.efficiency_table import (
    ClassifierSettings,
    ClassifierStep,
    efficiency_table,
    measure_efficiency,
    read_config,
    stock_config,
)
from shared_bert.evaluation.parameters import cost_of
from tests.conftest import TINY, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
D, LAYERS, MLP, WORDS, ROW = 32, 2, 48, 320, 128
FIELDS = {"vocab_size": WORDS, "max_position_embeddings": ROW}
MASA = {"depth_sharing": "masa", "num_atoms": 1, "coefficient_source": "network"}


@pytest.fixture
def glue(tmp_path):
    """A folder with few rows of CoLA."""
    (tmp_path / "glue" / "cola").mkdir(parents=True)
    for split, number in (("train", 20), ("validation", 6)):
        rows = {"sentence": ["the fox hunts", "the dog"] * (number // 2), "label": [1, 0] * (number // 2)}
        Dataset.from_dict(rows).to_parquet(tmp_path / "glue" / "cola" / f"{split}.parquet")
    return tmp_path / "glue"


@pytest.fixture
def without_memory(monkeypatch):
    """Memory is measured in processes of its own, which take long to start."""
    monkeypatch.setattr(module, "peak_memory", lambda settings, make_step: settings.config.num_hidden_layers * 2**20)


def classifier(config):
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def test_a_stock_model_is_counted_by_group(kind):
    stock = classifier(stock_config(tiny_config(kind, **FIELDS)))
    cost = cost_of(stock, ROW, predicted_share=1 / ROW)
    assert cost.parameters == {
        "attention": LAYERS * 4 * (D * D + D),
        "MLP": LAYERS * (2 * D * MLP + MLP + D),
        "embeddings": (WORDS + ROW + (2 if kind == "bert" else 0)) * D,
        # Norms; BERT's pooler; the head, which has a bias in BERT only.
        "other": 2 * D * (2 * LAYERS + 1) + 2 * D + (D * D + D + 2 if kind == "bert" else 0),
    }
    assert cost.total == stock.num_parameters()
    head = 2 * D + (D * D if kind == "bert" else 0)
    assert cost.forward_flops == 2 * (LAYERS * (4 * D * D + 2 * D * MLP + 2 * ROW * D) + head / ROW)


def test_a_scheme_changes_attention_only(kind):
    config = tiny_config(kind, **FIELDS, attention_scheme="unified", attention_bias=True)
    if kind == "gpt":  # stock GPT-2 has biases everywhere
        config.mlp_bias = config.norm_bias = True
    own, stock = (cost_of(classifier(c), ROW) for c in (config, stock_config(config)))
    saved = {group: stock.parameters[group] - number for group, number in own.parameters.items()}
    assert saved == {"attention": LAYERS * 2 * (D * D + D), "MLP": 0, "embeddings": 0, "other": 0}
    assert stock.forward_flops - own.forward_flops == 2 * LAYERS * 2 * D * D


def test_models_are_measured_beside_stock(kind, glue, tokenizers, without_memory):
    config = tiny_config(kind, **FIELDS, **MASA)
    configs = {
        "masa": config,
        "stock again": stock_config(config),
        "narrow": tiny_config(kind, **FIELDS, hidden_size=16),
    }
    result = measure_efficiency(configs, tokenizers[kind], "cola", load_glue("cola", glue), rows=18, rounds=2)
    stock, masa, again, narrow = result["models"]
    assert [row["model"] for row in result["models"]] == [f"stock {'bert' if kind == 'bert' else 'gpt2'}", *configs]
    assert stock["parameters"] == again["parameters"]
    # The network that makes the coefficients in pre-training is not in a finished model.
    finished = tiny_model(kind, type(classifier(config)), **FIELDS, **MASA | {"coefficient_source": "direct"})
    assert masa["parameters"]["total"] == finished.num_parameters()
    assert narrow["parameters"]["total"] < masa["parameters"]["total"] < stock["parameters"]["total"]
    assert (result["rows"], stock["time_saved"]) == (18, 0)
    for row in result["models"]:
        assert len(row["epoch_seconds"]) == 2
        assert row["seconds_per_epoch"] == pytest.approx(sum(row["epoch_seconds"]) / 2)
        assert row["time_saved"] == pytest.approx(1 - row["seconds_per_epoch"] / stock["seconds_per_epoch"])
        assert min(row["latency_ms"], row["tokens_per_second"], row["forward_flops_per_token"]) > 0
    _, _, header, rule, *lines = efficiency_table(result).splitlines()
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    assert [line.split("|")[1].strip() for line in lines] == [row["model"] for row in result["models"]]


def test_a_step_trains(kind):
    step = ClassifierStep(ClassifierSettings(tiny_config(kind, **FIELDS), "cpu"))
    before = [parameter.clone() for parameter in step.model.parameters()]
    step()
    assert step.input_ids.shape == (16, 128)
    assert any(not torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))


@pytest.mark.slow
def test_memory_is_that_of_a_step():
    config = tiny_config("bert", **FIELDS, hidden_size=512)
    memory = module.peak_memory(ClassifierSettings(config, "cpu"), ClassifierStep)
    # Weights, gradients and two moments, half of them at least.
    assert memory > 4 * 4 * classifier(config).num_parameters() / 2


@pytest.fixture(scope="module")
def script():
    """`main` of scripts/benchmark.py."""
    return runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["main"]


@pytest.fixture
def saved(tokenizers, tmp_path):
    tiny_model("bert", **FIELDS).save_pretrained(tmp_path / "model")
    tokenizers["bert"].save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_writes_both_tables(script, saved, glue, without_memory, tmp_path, capsys):
    other = tmp_path / "symmetric.yaml"
    fields = TINY | FIELDS | {"model_type": "shared_bert", "attention_scheme": "symmetric"}
    other.write_text("\n".join(f"{name}: {value}" for name, value in fields.items()))
    output = tmp_path / "out" / "efficiency.json"
    options = ["--task", "cola", "--data_dir", str(glue), "--rounds", "1", "--output", str(output)]
    assert script(["efficiency", "--model", f"{saved},{other}", *options]) == 0
    record = json.loads(output.read_text())
    assert record.keys() >= {"commit", "hardware", "torch", "transformers"}
    (result,) = record["results"]
    assert [row["model"] for row in result["models"]] == ["stock bert", saved, str(other)]
    table = output.with_suffix(".md").read_text()
    assert table == efficiency_table(result) + "\n"
    assert "20 rows of cola" in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "colla"], "'colla' is not a GLUE task; the nearest is 'cola'"),
        (["--data_dir", "/no/data"], "/no/data/cola has no file train.parquet"),
        (["--model", "/no/model"], "no model could be loaded from '/no/model': give a folder"),
        (["--model", "/no/config.yaml"], "/no/config.yaml cannot be read"),
        (["--tokenizer_name", "/no/tokenizer"], "no tokenizer could be loaded from '/no/tokenizer'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(options, message, script, saved, glue, tmp_path, capsys):
    output = tmp_path / "efficiency.json"
    defaults = ["--model", saved, "--data_dir", str(glue), "--output", str(output)]
    assert script(["efficiency", *defaults, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 10}, "but the model's vocab_size=10"),
        ({"max_position_embeddings": 127}, "max_length=128 is more than the model's max_position_embeddings=127"),
    ],
)
def test_models_that_cannot_read_the_rows_are_refused(fields, message, glue, tokenizers, monkeypatch):
    monkeypatch.setattr(module, "finetune", lambda *_: pytest.fail("time was spent"))
    configs = {"one": tiny_config("bert", **FIELDS), "two": tiny_config("bert", **FIELDS | fields)}
    with pytest.raises(ValueError, match=message):
        measure_efficiency(configs, tokenizers["bert"], "cola", load_glue("cola", glue))


def test_a_model_of_no_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="ViTConfig belongs to none of the families"):
        stock_config(read_config(str(tmp_path)))


def test_a_regression_is_measured(glue, tokenizers, without_memory):
    rows = load_glue("cola", glue)
    rows = {
        split: part.rename_column("sentence", "sentence1").map(
            lambda row: {"label": float(row["label"]), "sentence2": row["sentence1"]}
        )
        for split, part in rows.items()
    }
    result = measure_efficiency({"one": tiny_config("bert", **FIELDS)}, tokenizers["bert"], "stsb", rows, rounds=1)
    assert result["models"][1]["parameters"]["other"] == 2 * D * (2 * LAYERS + 1) + D * D + D + D + 1
