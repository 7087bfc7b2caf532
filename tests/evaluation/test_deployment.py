"""Every runtime gives the embeddings of the model, and the measurement compares like with like."""

import json
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import shared_bert
from shared_bert.evaluation import deployment as module
from shared_bert.evaluation.deployment import RUNTIMES, Deployed, Runtime, deployment_table, measure_deployment
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
D = TINY["hidden_size"]
LAYERS = 4
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter, of torch
# Exporting takes long.
NAMES = [pytest.param(name, marks=[] if name.startswith("torch") else pytest.mark.slow) for name in RUNTIMES]
INT8 = [name for name in NAMES if name.values[0].endswith("int8")]
FLOAT = [name for name in NAMES if name not in INT8]


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    fields = TINY | {"num_hidden_layers": LAYERS, "max_position_embeddings": 128, "initializer_range": 0.05}
    return BertModel(BertConfig(**fields)).eval()


@pytest.fixture(scope="module")
def model(original):
    """A model whose matrices are computed from weights."""
    return shared_bert.from_stock(original, depth_sharing="masa", num_atoms=2, align=False)[0].eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return tmp_path_factory.mktemp("deployed")


@pytest.fixture
def rows() -> list[torch.Tensor]:
    """Texts of other lengths than the exported example's."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, TINY["vocab_size"], (length,), generator=generator) for length in (11, 4, 9, 1)]


def deploy(name: str, model, folder: Path) -> Deployed:
    runtime = RUNTIMES[name]
    if missing := runtime.missing():
        pytest.skip(f"{name} {missing}")
    return runtime.deploy(model, folder)


def embeddings_of(model, rows: list[torch.Tensor]) -> torch.Tensor:
    """What a runtime should answer: each row alone, without padding and without a mask."""
    with torch.no_grad():
        states = [model(row[None]).last_hidden_state[0] for row in rows]
    means = torch.stack([of_row.mean(0) for of_row in states])
    return means / means.norm(dim=-1, keepdim=True)


def embed(deployed: Deployed, rows: list[torch.Tensor]) -> torch.Tensor:
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.stack([torch.arange(padded.shape[1]) < len(row) for row in rows]).long()
    return deployed.embed(padded, mask)


@pytest.mark.parametrize("name", FLOAT)
def test_embeddings_are_those_of_the_model(name, model, folder, rows):
    deployed = deploy(name, model, folder)
    torch.testing.assert_close(embed(deployed, rows), embeddings_of(model, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", INT8)
def test_int8_moves_embeddings_a_little(name, model, folder, rows):
    deployed = deploy(name, model, folder)
    distance = (embed(deployed, rows) - embeddings_of(model, rows)).norm(dim=-1)
    # Rounding moves an entry by up to 1/254 of the largest one that has the same scale: in ONNX Runtime's activations,
    # of all rows.
    assert (distance > 1e-4).all()
    assert (distance < 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ONNX Runtime", "OpenVINO"])
def test_int8_takes_a_byte_where_float_takes_four(name, tmp_path):
    wide = BertModel(BertConfig(**TINY | {"hidden_size": 128, "intermediate_size": 4096})).eval()
    sizes = [deploy(of, wide, tmp_path).file_bytes for of in (name, f"{name} int8")]
    weights = sum(parameter.numel() for parameter in wide.encoder.parameters() if parameter.ndim == 2)
    assert sizes[0] > 4 * weights
    assert sizes[0] - sizes[1] == pytest.approx(3 * weights, rel=0.1)


def test_bytes_of_a_shared_matrix_are_saved(original, tmp_path):
    shared, _ = shared_bert.from_stock(original, attention_scheme="shared_kv")
    sizes = [deploy("torch", of, tmp_path / str(of is original)).file_bytes for of in (original, shared)]
    # The rest is the names of the tensors.
    assert sizes[0] - sizes[1] == pytest.approx(4 * LAYERS * (D * D + D), abs=2000)


def test_conversions_and_their_exports_are_the_same_models(original, rows):
    models = module.deployed_models(original)
    assert list(models) == ["original", *(name for of in module.CONVERSIONS for name in (of, f"{of}, exported"))]
    for name, options in module.CONVERSIONS.items():
        converted, exported = models[name], models[f"{name}, exported"]
        assert isinstance(exported, BertModel)
        assert {field: getattr(converted.config, field) for field in options} == options
        expected = embeddings_of(converted.eval(), rows)
        torch.testing.assert_close(embeddings_of(exported.eval(), rows), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_runtimes(monkeypatch):
    """torch, and a runtime whose first entries are wrong by 0.25, beside one that is missing."""

    def deploy_wrong(model, folder: Path) -> Deployed:
        right = RUNTIMES["torch"].deploy(model, folder)
        wrong = torch.zeros(D)
        wrong[0] = 0.25
        return Deployed(lambda *inputs: right.embed(*inputs) + wrong, 77)

    runtimes = {
        "torch": RUNTIMES["torch"],
        "wrong": Runtime(deploy_wrong),
        "absent": Runtime(deploy_wrong, ("absent_package", "json"), "some_extra"),
    }
    monkeypatch.setattr(module, "RUNTIMES", runtimes)
    return tuple(runtimes)


def test_rows_hang_together(original, two_runtimes):
    result = measure_deployment({"one": original, "other": original}, two_runtimes, rounds=3)
    assert result["skipped"] == {"absent": "needs absent_package: pip install 'shared_bert[some_extra]'"}
    rows = result["rows"]
    assert [(row["runtime"], row["model"]) for row in rows] == [
        ("torch", "one"),
        ("torch", "other"),
        ("wrong", "one"),
        ("wrong", "other"),
    ]
    for row in rows:
        assert len(row["latency_seconds"]) == len(row["throughput_seconds"]) == 3
        assert row["latency_ms"] == pytest.approx(1000 * statistics.median(row["latency_seconds"]))
        assert row["tokens_per_second"] * statistics.median(row["throughput_seconds"]) == pytest.approx(8 * 128)
        assert row["difference"] == pytest.approx(0.25 * (row["runtime"] == "wrong"), abs=1e-5)
    assert [row["file_bytes"] for row in rows[2:]] == [77, 77]


def test_all_take_turns_call_by_call(original, monkeypatch):
    calls = []

    def deploy_listed(model, folder: Path) -> Deployed:
        def embed(input_ids, attention_mask):
            assert attention_mask.all()
            calls.append((model.name, tuple(input_ids.shape)))
            return torch.zeros(len(input_ids), D)

        return Deployed(embed, 0)

    monkeypatch.setattr(module, "RUNTIMES", {"listed": Runtime(deploy_listed)})
    other = BertModel(original.config)
    original.name, other.name = "one", "other"
    measure_deployment({"one": original, "other": other}, ("listed",), rounds=1)
    # Two rounds of warm-up and one that counts, each in some order; the last calls are compared with torch.
    latency = [(name, (1, 16)) for name in ("one", "other") for _ in range(module.LATENCY_CALLS)]
    throughput = [(name, (8, 128)) for name in ("one", "other")]
    for expected in 3 * [latency] + 4 * [throughput]:
        found, calls = calls[: len(expected)], calls[len(expected) :]
        assert sorted(found) == expected
    assert not calls


ROW = {"runtime": "torch", "model": "one", "file_bytes": 4_000_000, "latency_ms": 6.0, "tokens_per_second": 2000.0}
OTHER = {"model": "other", "file_bytes": 3_000_000, "latency_ms": 4.0, "tokens_per_second": 5000.0, "difference": 0.02}


def test_the_table_compares_within_a_runtime():
    elsewhere = {"runtime": "OpenVINO", "model": "one", "latency_ms": 3.0, "difference": 1e-6}
    rows = [ROW | {"difference": 0.0}, ROW | OTHER, ROW | elsewhere]
    result = {"rounds": 3, "shapes": {"latency": (1, 16), "throughput": (8, 128)}, "rows": rows}
    text = deployment_table({**result, "skipped": {"ONNX Runtime": "needs onnx"}})
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert table[2:] == [
        ["torch", "one", "4.0 (1.00×)", "6.00 (1.00×)", "2,000 (1.00×)", "0.0e+00"],
        ["torch", "other", "3.0 (0.75×)", "4.00 (1.50×)", "5,000 (2.50×)", "2.0e-02"],
        ["OpenVINO", "one", "4.0 (1.00×)", "3.00 (1.00×)", "2,000 (1.00×)", "1.0e-06"],
    ]
    assert "1 × 16 tokens, throughput at 8 × 128; medians of 3 rounds" in text
    assert text.endswith("ONNX Runtime was left out: it needs onnx\n")


def test_the_command_writes_both_tables(original, two_runtimes, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure_deployment, "__defaults__", (two_runtimes, 9))
    main = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["main"]
    original.save_pretrained(tmp_path / "model")
    output = tmp_path / "out" / "deploy.json"
    assert main(["deploy", "--model", str(tmp_path / "model"), "--rounds", "1", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record.keys() >= {"commit", "hardware", "threads", "torch", "transformers"}
    (result,) = record["results"]
    assert [row["model"] for row in result["rows"]] == 2 * list(module.deployed_models(original))
    assert result["rounds"] == 1
    assert output.with_suffix(".md").read_text() == deployment_table(result)
    assert deployment_table(result) in capsys.readouterr().out


def test_a_model_that_is_no_stock_bert_is_refused(original, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["main"]
    shared_bert.from_stock(original, attention_scheme="shared")[0].save_pretrained(tmp_path / "model")
    assert main(["deploy", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "deploy.json")]) == 2
    assert "SharedBertModel" in capsys.readouterr().err
