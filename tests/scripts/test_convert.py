"""scripts/convert.py: what it writes, what it refuses, and that it leaves nothing by halves."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM

import shared_bert

from ..conftest import tiny_model


@pytest.fixture
def save(tmp_path, tokenizers):
    def save(kind, name="model", **options):
        folder = tmp_path / name
        model = tiny_model(kind, **{"vocab_size": 320, **options})
        model.save_pretrained(folder)
        tokenizers[kind].save_pretrained(folder)
        return model, folder

    return save


def run(convert, capsys, *arguments) -> str:
    """Runs the script, which must fail with one line, and gives that line."""
    capsys.readouterr()
    assert convert(list(map(str, arguments))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("convert.py: ")
    return line


@pytest.mark.parametrize("fields", [{}, {"depth_sharing": "masa", "num_atoms": 1, "coefficient_source": "network"}])
def test_to_stock_writes_model_and_tokenizer(convert, save, tmp_path, capsys, kind, fields):
    model, folder = save(kind, **fields)
    (folder / "tokenizer_extra.txt").write_text("kept")
    assert convert(["to-stock", str(folder), str(tmp_path / "out")]) == 0
    stock_class = {"bert": "BertForMaskedLM", "gpt": "GPT2LMHeadModel"}[kind]
    assert stock_class in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [stock_class]
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("the fox hunts", return_tensors="pt")
    assert inputs["input_ids"].tolist() == AutoTokenizer.from_pretrained(folder)(["the fox hunts"])["input_ids"]
    assert (tmp_path / "out" / "tokenizer_extra.txt").read_text() == "kept"
    base = AutoModel.from_pretrained(tmp_path / "out", **({"add_pooling_layer": False} if kind == "bert" else {}))
    expected = model.base_model(inputs["input_ids"]).last_hidden_state
    torch.testing.assert_close(base(inputs["input_ids"]).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_to_stock_without_tokenizer_or_pooler(convert, tmp_path):
    model = shared_bert.SharedBertModel(tiny_model("bert").config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()  # empty: free to be used
    assert convert(["to-stock", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


def test_to_stock_refuses(convert, save, tmp_path, capsys):
    _, folder = save("bert")
    before = sorted(tmp_path.rglob("*"))
    assert "exists and is not an empty folder" in run(convert, capsys, "to-stock", folder, folder)
    (folder / "file").touch()
    assert "exists and is not an empty folder" in run(convert, capsys, "to-stock", folder, folder / "file")
    (folder / "file").unlink()
    assert "missing" in run(convert, capsys, "to-stock", tmp_path / "missing", tmp_path / "out")
    assert before == sorted(tmp_path.rglob("*"))

    BertForMaskedLM(shared_bert.to_stock(tiny_model("bert")).config).save_pretrained(tmp_path / "stock")
    message = run(convert, capsys, "to-stock", tmp_path / "stock", tmp_path / "out")
    assert "stock holds a BertForMaskedLM and must be one of SharedBertModel, " in message

    tiny_model("bert", shared_bert.SharedBertModel).save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless" / "config.json").read_text())
    config["architectures"] = ["SharedBertForMaskedLM"]
    (tmp_path / "headless" / "config.json").write_text(json.dumps(config))
    message = run(convert, capsys, "to-stock", tmp_path / "headless", tmp_path / "out")
    assert "lacks weights of a SharedBertForMaskedLM: cls.predictions" in message
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_failure(convert, save, tmp_path, capsys, monkeypatch):
    _, folder = save("bert")

    def full_disk(self, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(BertForMaskedLM, "save_pretrained", full_disk)
    assert "no space left" in run(convert, capsys, "to-stock", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
