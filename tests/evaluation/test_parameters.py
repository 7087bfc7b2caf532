"""The papers' counts, in groups that leave nothing out, and clear refusals."""

import json
import runpy
from pathlib import Path

import pytest

import shared_bert
from shared_bert import SharedBertConfig, SharedGptConfig
from shared_bert.evaluation import cost_table, load_config, model_cost
from tests.conftest import LANGUAGE_MODELS, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
MASA = {"depth_sharing": "masa", "num_atoms": 4, "depth_shared_matrices": "qkvo"}


def test_the_papers_bert_base():
    config = load_config(ROOT / "configs/models/shared_bert_base.yaml")
    shared, standard = model_cost(config, 512), model_cost(config.with_attention(), 512)
    assert (shared.total, standard.total) == (95_367_738, 109_514_298)
    d, layers = 768, 12
    assert standard.parameters == {
        "attention": layers * 4 * (d * d + d),
        "MLP": layers * (8 * d * d + 5 * d),
        "embeddings": (30522 + 512 + 2) * d,
        "other": 2 * d * (2 * layers + 1) + (d * d + d + 2 * d + 30522),  # norms; the head's transform and bias
    }
    assert standard.total - shared.total == standard.parameters["attention"] - shared.parameters["attention"]
    assert standard.forward_flops - shared.forward_flops == 2 * layers * 2 * d * d


def test_the_papers_masa():
    """Two thirds of attention saved, but for the coefficients; nothing of the work."""
    masa = model_cost(SharedGptConfig(attention_scheme="standard", **MASA), 1024)
    standard = model_cost(SharedGptConfig(attention_scheme="standard"), 1024)
    assert standard.parameters["attention"] == 12 * 4 * 768**2
    assert masa.parameters["attention"] == 4 * 4 * 768**2 + 4 * 12 * 4
    assert masa.forward_flops == standard.forward_flops


@pytest.mark.parametrize("sharing", [{}, {"depth_sharing": "masa", "num_atoms": 2}])
def test_every_parameter_is_in_one_group(kind, scheme, sharing):
    config = tiny_config(kind, attention_scheme=scheme, **sharing)
    assert model_cost(config, 8).total == LANGUAGE_MODELS[kind](config).num_parameters()


def test_a_stock_model_that_shares(tmp_path, capsys):
    from tests.injection.architectures import ARCHITECTURES

    llama = ARCHITECTURES["llama"].model()
    options = {"depth_sharing": "masa", "num_atoms": 2, "coefficient_source": "network", "initialize": True}
    model, _ = shared_bert.share(llama, targets=["q_proj", "up_proj"], **options)
    model.save_pretrained(tmp_path)
    own = model_cost(load_config(tmp_path), 16).parameters
    projections, ups, matrix = 4 * 32 * 32, 4 * 48 * 32, 4 * 2  # and the coefficients of each
    rest = 4 * (2 * 16 * 32 + 32 * 32), 4 * 2 * 48 * 32
    assert own["attention"] == projections // 2 + matrix + rest[0]
    assert own["MLP"] == ups // 2 + matrix + rest[1]
    main = runpy.run_path(str(ROOT / "scripts" / "count_parameters.py"))["main"]
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("llama, standard, depth sharing masa; rows of 64")
    assert f"{llama.num_parameters():,}" in printed


def test_a_network_counts_as_its_coefficients():
    network = SharedBertConfig(**MASA, coefficient_source="network")
    assert model_cost(network, 512) == model_cost(SharedBertConfig(**MASA), 512)
    assert network.coefficient_source == "network"


def test_standard_has_the_same_shape_and_head(kind):
    fields = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 77, "attention_bias": False}
    grouped = {"attention_scheme": "shared_kv", "num_key_value_heads": 2, "attention_scale": 0.7}
    masa = {"depth_sharing": "masa", "num_atoms": 2, "rank": 3, "coefficient_source": "network"}
    expected = tiny_config(kind, **fields, attention_scheme="standard")
    assert tiny_config(kind, **fields, **grouped, **masa).with_attention().to_dict() == expected.to_dict()


def test_the_table_says_what_is_saved():
    lines = cost_table(SharedGptConfig(attention_scheme="standard", **MASA)).splitlines()
    assert "rows of 1024" in lines[0]
    assert lines[1].split() == ["this", "standard", "saved"]
    rows = {line[:20].strip(): line[20:].split() for line in lines[2:]}
    assert list(rows) == ["attention", "MLP", "embeddings", "other", "parameters", "forward FLOPs/token"]
    assert rows["attention"] == ["9,437,376", "28,311,552", "66.7%"]
    assert rows["parameters"] == ["105,499,584", "124,373,760", "15.2%"]
    assert rows["MLP"][2] == rows["forward FLOPs/token"][2] == "0.0%"


def test_a_saved_model_is_counted(kind, tmp_path):
    model = tiny_model(kind, depth_sharing="sequential", num_groups=1)
    model.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_cost(load_config(path), 8).total == model.num_parameters()
    assert load_config(tmp_path, "num_hidden_layers=1").num_hidden_layers == 1


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        (None, None, "cannot be read: No such file"),
        ("[1]", None, "must hold keys and values"),
        ("a: [", None, "is not YAML"),
        ("hidden_size: 32", None, "model_type=None.*shared_bert"),
        ("model_type: bert", None, "model_type='bert'.*shared_gpt"),
        ("{model_type: shared_bert, hiden_size: 32}", None, "'hiden_size'.*'hidden_size'"),
        ("model_type: shared_bert", "rnak=2", "config_overrides.*'rnak'.*'rank'"),
        ("model_type: shared_bert", "rank", "'rank' has no value"),
        ("model_type: shared_bert", "depth_sharing=masa", "needs num_atoms"),
        ("model_type: shared_bert", "hidden_size=wide", "hidden_size"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, content, overrides, message):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path, overrides)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_without_a_config_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_config(tmp_path)


@pytest.mark.parametrize("length", [0, 513])
def test_lengths_that_the_model_cannot_read_are_refused(length):
    with pytest.raises(ValueError, match=f"sequence_length={length}.*max_position_embeddings=512"):
        cost_table(SharedBertConfig(), length)


@pytest.fixture(scope="module")
def script():
    """`main` of scripts/count_parameters.py."""
    return runpy.run_path(str(ROOT / "scripts" / "count_parameters.py"))["main"]


def test_the_script_prints_the_table(script, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "shared_bert"}))
    options = ["--config_overrides", "attention_scheme=symmetric", "--sequence_length", "128"]
    assert script([str(path), *options]) == 0
    printed = capsys.readouterr().out
    assert printed.rstrip() == cost_table(SharedBertConfig(attention_scheme="symmetric"), 128)
    assert "102,427,194" in printed


def test_the_script_refuses_in_one_line(script, tmp_path, capsys):
    assert script([str(tmp_path / "missing.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("count_parameters.py: ")
    assert "missing.yaml" in line
