"""scripts/convert.py: what it writes, what it refuses, and that it leaves nothing by halves."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import shared_bert
from shared_bert.training import healing

from ..conftest import TEXT, tiny_model
from ..training import runs
from .conftest import ROOT


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
    for name in ("tokenizer_extra.txt", "preprocessor_config.json"):
        (folder / name).write_text("kept")
    assert convert(["to-stock", str(folder), str(tmp_path / "out")]) == 0
    stock_class = {"bert": "BertForMaskedLM", "gpt": "GPT2LMHeadModel"}[kind]
    assert stock_class in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [stock_class]
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")("the fox hunts", return_tensors="pt")
    assert inputs["input_ids"].tolist() == AutoTokenizer.from_pretrained(folder)(["the fox hunts"])["input_ids"]
    for name in ("tokenizer_extra.txt", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_text() == "kept"
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


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "wide"), ("hidden_size", 64), ("attention_scheme", "nothing")]
)
def test_a_damaged_config_is_refused(convert, save, tmp_path, capsys, field, value):
    _, folder = save("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    run(convert, capsys, "to-stock", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_weights_are_refused(convert, save, tmp_path, capsys):
    _, folder = save("bert")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    assert "model cannot be loaded" in run(convert, capsys, "to-stock", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_a_failure(convert, save, tmp_path, capsys, monkeypatch):
    _, folder = save("bert")

    def full_disk(self, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(BertForMaskedLM, "save_pretrained", full_disk)
    assert "no space left" in run(convert, capsys, "to-stock", folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


AUTO_CLASSES = {"bert": AutoModelForMaskedLM, "gpt": AutoModelForCausalLM}


@pytest.fixture
def stock(convert, save, tmp_path, monkeypatch):
    """Makes the folder of a stock model in which attention matters."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def stock(kind, **options):
        fields = {"attention_scheme": "standard", "attention_bias": True, "initializer_range": 0.15}
        _, folder = save(kind, "trained", **fields, **options)
        assert convert(["to-stock", str(folder), str(tmp_path / "stock")]) == 0
        return tmp_path / "stock"

    return stock


@pytest.fixture
def text(tmp_path):
    return runs.write_text(tmp_path / "text.txt")


def logits(kind, folder, input_ids):
    return AUTO_CLASSES[kind].from_pretrained(folder)(input_ids).logits


def test_from_stock_writes_model_tokenizer_and_report(convert, stock, tmp_path, capsys, kind, input_ids):
    folder = stock(kind)
    options = ["--depth_sharing", "masa", "--num_atoms", "2", "--depth_shared_matrices", "qkvo"]
    assert convert(["from-stock", str(folder), str(tmp_path / "out"), *options]) == 0
    # With as many atoms as layers nothing is lost.
    expected = logits(kind, folder, input_ids)
    torch.testing.assert_close(logits(kind, tmp_path / "out", input_ids), expected, rtol=1e-4, atol=1e-4)
    config = shared_bert.SharedAttentionConfig.from_pretrained(tmp_path / "out")
    assert (config.depth_sharing, config.num_atoms, config.depth_shared_matrices) == ("masa", 2, "qkvo")
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["options"]["num_atoms"] == 2
    assert record["report"]["depth_sharing"] == "masa"
    assert "masa" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == (
        AutoTokenizer.from_pretrained(folder).get_vocab()
    )


def test_from_stock_takes_a_model_of_this_package(convert, save, tmp_path):
    _, folder = save("gpt", attention_scheme="query_free")
    assert convert(["from-stock", str(folder), str(tmp_path / "out"), "--attention_scheme", "shared_kv"]) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.attention_scheme == "shared_kv"


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_calibration_text_is_used(convert, stock, text, tmp_path, streaming):
    folder = stock("bert")
    options = ["--depth_sharing", "low_rank", "--rank", "4"]
    read = f"--calibration_tokens 500 --sample_by line --block_size 32 --streaming {streaming}".split()
    assert convert(["from-stock", str(folder), str(tmp_path / "plain"), *options]) == 0
    assert (
        convert(["from-stock", str(folder), str(tmp_path / "out"), *options, "--calibration", str(text), *read]) == 0
    )
    plain, out = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert plain.keys() == out.keys()
    assert any(not torch.allclose(plain[name], out[name], atol=1e-3) for name in plain)


BAD_OPTIONS = [
    ("--attention_scheme nothing", "invalid choice: 'nothing'"),
    ("--nothing 1", "unrecognized arguments: --nothing 1"),
    ("--num_key_value_heads 3", "num_key_value_heads=3 must divide num_attention_heads=4"),
    ("--depth_sharing masa --num_atoms 3", "num_atoms=3 must be at least 1 and at most num_hidden_layers=2"),
    ("--depth_sharing masa", "depth_sharing='masa' needs num_atoms"),
    ("--depth_sharing low_rank --rank 33", "rank=33 must be at least 1 and at most hidden_size=32"),
    ("--num_atoms 2", "num_atoms=2 does not go with depth_sharing='none'"),
    ("--calibration EMPTY --block_size 32", "calibration text EMPTY: the corpus has 0 tokens"),
    ("--calibration missing.txt --block_size 32", "no file found at 'missing.txt'"),
    ("--calibration TEXT", "block_size=512 is more than the model's max_position_embeddings=40"),
    ("--calibration TEXT --block_size 32 --calibration_tokens 0", "num_tokens=0 must be at least 1"),
    ("--calibration_tokens 100", "calibration_tokens=100 needs calibration"),
    ("--max_steps 3", "--max_steps goes with --heal"),
    ("--sample_by line", "--sample_by goes with --heal or --calibration"),
    ("--output_dir out", "--output_dir: name the folder as OUTPUT only"),
    ("--heal --use_cpu --train_file TEXT", "block_size=512 is more than the model's max_position_embeddings=40"),
    ("--heal --block_size 32 --use_cpu", "healing needs text"),
    ("--heal --block_size 32 --use_cpu --train_file missing.txt", "no file found at 'missing.txt'"),
    ("--heal --block_size 32 --use_cpu --train_file EMPTY --validation_file TEXT", "train text: the corpus has 0"),
    ("--heal --block_size 32 --use_cpu --train_file TEXT --sample_by line --num_atoms 2", "num_atoms=2 does not go"),
    ("--heal --overwrite_output_dir", "--overwrite_output_dir"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_from_stock_refuses(convert, stock, text, tmp_path, capsys, options, message):
    folder = stock("bert")
    (tmp_path / "empty.txt").write_text(" \n")
    places = {"EMPTY": str(tmp_path / "empty.txt"), "TEXT": str(text)}
    for name, path in places.items():
        options, message = options.replace(name, path), message.replace(name, path)
    assert message in run(convert, capsys, "from-stock", folder, tmp_path / "out", *options.split())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.mark.parametrize("heal", ["", "--heal"])
def test_from_stock_refuses_a_model_that_shares(convert, save, text, tmp_path, capsys, heal):
    _, folder = save("gpt")
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    llama = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320, max_position_embeddings=40))
    shared_bert.share(llama, depth_sharing="masa", num_atoms=1)[0].save_pretrained(folder)
    options = f"--depth_sharing low_rank --rank 4 {heal}".split()
    if heal:
        options += f"--block_size 32 --sample_by line --validation_split 0.1 --use_cpu --train_file {text}".split()
    message = run(convert, capsys, "from-stock", folder, tmp_path / "out", *options)
    assert "the model shares already: dequantize() it first" in message


def test_from_stock_refuses_what_is_no_class(convert, stock, tmp_path, capsys):
    folder = stock("bert")
    config = json.loads((folder / "config.json").read_text())
    for architectures, named in ((["BertForNothing"], "BertForNothing"), (None, "model of no named class")):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
        message = run(convert, capsys, "from-stock", folder, tmp_path / "out")
        assert f"stock holds a {named} and must be one of BertModel, " in message
    assert not (tmp_path / "out").exists()


def heal_options(text, *more) -> list[str]:
    options = (
        "--attention_scheme shared_kv --heal --block_size 32 --sample_by line --validation_split 0.1 "
        "--max_steps 12 --per_device_train_batch_size 8 --learning_rate 1e-2 --logging_steps 1 "
        f"--save_steps 5 --use_cpu --disable_tqdm true --train_file {text}"
    )
    return [*options.split(), *more]


def distance(kind, folder, stock, input_ids):
    return (logits(kind, folder, input_ids) - logits(kind, stock, input_ids)).norm()


def test_healing(convert, stock, text, tmp_path, kind, input_ids):
    folder, out = stock(kind), tmp_path / "out"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "1_Pooling" / "pytorch_model.bin").write_text("a layer of sentence-transformers")
    assert convert(["from-stock", str(folder), str(out), *heal_options(text, "--max_steps", "60")]) == 0
    assert {path.name for path in (out / "1_Pooling").iterdir()} == {"config.json", "pytorch_model.bin"}
    assert {path.name for path in out.glob("checkpoint-*")} >= {"checkpoint-5", "checkpoint-60"}
    assert (out / "converted" / "conversion.json").exists()
    assert AutoTokenizer.from_pretrained(out).get_vocab()
    tokens = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")["input_ids"][:, :30]
    assert distance(kind, out, folder, tokens) < distance(kind, out / "converted", folder, tokens) / 2


def test_a_run_stopped_before_its_first_checkpoint(convert, stock, text, tmp_path, capsys, monkeypatch):
    folder, out = stock("bert"), tmp_path / "out"
    options = ["from-stock", str(folder), str(out), *heal_options(text)]

    def stop(*args, **kwargs):
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(healing.HealingTrainer, "train", stop)
        assert "stopped" in run(convert, capsys, *options)
    assert "exists and is not an empty folder" in run(convert, capsys, *options)
    monkeypatch.setattr("shared_bert.training.converting.from_stock", stop)  # the conversion is not made again
    message = run(convert, capsys, *options, "--resume_from_checkpoint", "true", "--attention_scheme", "unified")
    assert "was made with attention_scheme='shared_kv', not 'unified'" in message
    assert convert([*options, "--resume_from_checkpoint", "true"]) == 0
    assert (out / "model.safetensors").exists()


# scripts/convert.py, killed where the environment says.
KILLED = """
import os, runpy, sys
from transformers import PreTrainedModel

def save(self, folder, **kwargs):
    plain_save(self, folder, **kwargs)
    os.kill(os.getpid(), int(os.environ["KILL_IN_SAVING"]))

if "KILL_IN_SAVING" in os.environ:
    plain_save, PreTrainedModel.save_pretrained = PreTrainedModel.save_pretrained, save
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def run_there(*arguments, **environment):
    return runs.run(
        "-c", runs.KILLED_HEALING + KILLED, ROOT / "scripts" / "convert.py", "from-stock", *arguments, **environment
    )


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_whole(convert, stock, text, tmp_path):
    folder, out, healed = stock("bert"), tmp_path / "out", tmp_path / "healed"
    assert run_there(folder, out, KILL_IN_SAVING="9").returncode == -signal.SIGKILL
    assert run_there(folder, healed, *heal_options(text), KILL_IN_SAVING="9").returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in healed.iterdir()] == ["converted.unfinished"]
    assert convert(["from-stock", str(folder), str(out)]) == 0
    resumed = ["from-stock", str(folder), str(healed), *heal_options(text, "--resume_from_checkpoint", "true")]
    assert convert(resumed) == 0
    assert {"model.safetensors", "converted"} < {path.name for path in healed.iterdir()}
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.slow
def test_a_terminated_conversion_leaves_nothing(stock, tmp_path):
    folder, out = stock("bert"), tmp_path / "out"
    assert run_there(folder, out, KILL_IN_SAVING="15").returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_killed_healing_is_resumed_exactly(convert, stock, text, tmp_path):
    folder = stock("gpt")
    whole = run_there(folder, tmp_path / "whole", *heal_options(text))
    assert whole.returncode == 0, whole.stderr
    killed = run_there(folder, tmp_path / "out", *heal_options(text), KILL_AT_STEP="7")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "model.safetensors").exists()
    resumed = run_there(folder, tmp_path / "out", *heal_options(text), "--resume_from_checkpoint", "true")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert expected.keys() == found.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_convert_once_and_heal(stock, text, tmp_path):
    config = ROOT / "configs" / "accelerate" / "ddp_2cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, ROOT / "scripts/convert.py"]
    options = ["from-stock", stock("bert"), tmp_path / "out", *heal_options(text)]
    process = subprocess.run([*launch, *options], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("the converted model is in") == 1
    curve = runs.losses(tmp_path / "out")
    assert len(curve) == 12
    assert curve[12] < curve[1] / 2
    assert (tmp_path / "out" / "model.safetensors").exists()
