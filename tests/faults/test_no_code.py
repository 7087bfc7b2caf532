"""Nothing that a folder holds is run: no pickle, no module, no kernel; and nobody is asked whether it may be."""

import builtins
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, modeling_utils

import shared_bert
from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.data import load_tokenizer
from shared_bert.folders import load_model
from shared_bert.training.checkpoints import checkpoint_damage

from ..conftest import LANGUAGE_MODELS, tiny_model
from ..training.test_pretraining import run_here
from .jobs import SCRIPTS


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    def asked(*arguments):
        raise AssertionError(f"asked: {arguments}")

    monkeypatch.setattr(builtins, "input", asked)


@pytest.fixture
def sentinel(tmp_path):
    """A file that exists only when foreign code has run."""
    path = tmp_path / "foreign code has run"
    yield path
    assert not path.exists()


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_pickle_is_evil(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.fixture
def saved(tmp_path, tokenizers, kind):
    folder = tmp_path / "saved"
    tiny_model(kind, vocab_size=320).save_pretrained(folder)
    tokenizers[kind].save_pretrained(folder)
    return folder


def change(path, **fields):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **fields}))


LOADERS = [
    AutoModel.from_pretrained,
    lambda folder: load_model(folder, STOCK_CLASSES),
    lambda folder: getattr(shared_bert, AutoConfig.from_pretrained(folder).architectures[0]).from_pretrained(folder),
]


@pytest.mark.parametrize("evil", [True, False])
@pytest.mark.parametrize("load", LOADERS)
def test_pickled_weights_are_refused(saved, sentinel, load, evil):
    weights = load_file(saved / "model.safetensors")
    torch.save({"weight": Evil(sentinel)} if evil else weights, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(str(saved))


@pytest.mark.parametrize("load", LOADERS)
def test_a_config_cannot_name_a_pickle(saved, sentinel, load):
    torch.save({"weight": Evil(sentinel)}, saved / "adapter_model.bin")
    change(saved / "config.json", transformers_weights="adapter_model.bin")
    load(str(saved))
    (saved / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(str(saved))


def test_pickled_weights_are_not_to_be_had(saved, kind):
    with pytest.raises(ValueError, match="use_safetensors=False asks for pickled weights"):
        LANGUAGE_MODELS[kind].from_pretrained(saved, use_safetensors=False)


def test_stock_models_are_read_so_too(tmp_path, sentinel, kind):
    shared_bert.to_stock(tiny_model(kind, attention_scheme="standard")).save_pretrained(tmp_path / "stock")
    torch.save({"weight": Evil(sentinel)}, tmp_path / "stock" / "pytorch_model.bin")
    (tmp_path / "stock" / "model.safetensors").unlink()
    out = tmp_path / "out"
    assert SCRIPTS["convert.py"](["from-stock", str(tmp_path / "stock"), str(out)]) == 2
    assert not out.exists()


@pytest.fixture(scope="module")
def checkpoints_of_a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        run_here(folder, max_steps=4, save_steps=2)
    return folder / "run"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
def test_an_evil_checkpoint_is_skipped(tmp_path, checkpoints_of_a_run, sentinel, caplog, name):
    shutil.copytree(checkpoints_of_a_run, tmp_path / "run")
    torch.save({"state": Evil(sentinel)}, tmp_path / "run" / "checkpoint-4" / name)
    options = {"max_steps": 6, "save_steps": 2, "resume_from_checkpoint": "true"}
    if name == "training_args.bin":  # which nobody reads
        run_here(tmp_path, **options)
        return
    assert "contains more than tensors" in checkpoint_damage(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(
        ValueError, match=rf"checkpoint-4.* cannot be resumed: {name} is damaged or contains more than tensors"
    ):
        run_here(tmp_path, **{**options, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4")})
    run_here(tmp_path, **options)
    assert f"checkpoint-4 is skipped: {name}" in caplog.text


@pytest.fixture
def evil_code(saved, sentinel):
    """Code beside the model, and everything that could point to it."""
    (saved / "evil.py").write_text(f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\nclass Evil: pass\n")
    (saved / "custom_generate").mkdir()
    (saved / "custom_generate" / "generate.py").write_text((saved / "evil.py").read_text())
    auto = ["AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"]
    change(saved / "config.json", auto_map=dict.fromkeys(auto, "evil.Evil"))
    change(saved / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    return saved


def test_the_code_is_evil(evil_code, tmp_path):
    exec((evil_code / "evil.py").read_text())
    (tmp_path / "foreign code has run").unlink()


@pytest.mark.parametrize("load", [AutoConfig.from_pretrained, load_tokenizer, *LOADERS])
def test_our_own_classes_are_taken(evil_code, load):
    assert type(load(str(evil_code))).__module__.split(".")[0] in ("shared_bert", "transformers")


def test_generation_is_our_own(evil_code, kind):
    model = load_model(str(evil_code), STOCK_CLASSES)
    if kind == "gpt":
        assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("own_type", [True, False])
def test_scripts_run_no_code(evil_code, tmp_path, capsys, own_type):
    """Also where the model or the tokenizer is one that only the folder's code knows."""
    if not own_type:
        change(evil_code / "config.json", model_type="evil", architectures=["Evil"])
        change(evil_code / "tokenizer_config.json", tokenizer_class="Evil")
    (tmp_path / "text.txt").write_text("the fox hunts . the dog barks . the owl sees .\n" * 200)
    text = ["--train_file", str(tmp_path / "text.txt"), "--validation_file", str(tmp_path / "text.txt")]
    training = ["--block_size", "32", "--max_steps", "1", "--use_cpu", "--output_dir"]
    converted = SCRIPTS["convert.py"](["from-stock", str(evil_code), str(tmp_path / "converted")])
    begun = SCRIPTS["pretrain.py"](
        ["--model_name_or_path", str(evil_code), *text, *training, str(tmp_path / "trained")]
    )
    model_type = json.loads((evil_code / "config.json").read_text())["model_type"]
    if own_type:
        assert (converted, begun) == (0, 0)
    else:
        assert (converted, begun) == (2, 2)
        assert "Traceback" not in capsys.readouterr().err
    new = ["--model_type", "shared_bert" if model_type == "evil" else model_type, "--tokenizer_name", str(evil_code)]
    small = ["--config_overrides", "hidden_size=32,num_attention_heads=2,num_hidden_layers=1,intermediate_size=32"]
    assert SCRIPTS["pretrain.py"]([*new, *small, *text, *training, str(tmp_path / "new")]) == (0 if own_type else 2)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_config_file_cannot_choose_a_kernel(saved, kind, field):
    change(saved / "config.json", **{field: "kernels-community/flash-attn2"})
    model = LANGUAGE_MODELS[kind].from_pretrained(saved)
    assert model.config._attn_implementation == "sdpa"
    assert (
        LANGUAGE_MODELS[kind].from_pretrained(saved, attn_implementation="eager").config._attn_implementation
        == "eager"
    )


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_stock_config_cannot_either(tmp_path, monkeypatch, kind, field):
    def loaded(*arguments, **options):
        raise AssertionError(f"a kernel is loaded: {arguments}")

    # Not what it calls in turn: after its first call it takes a kernel to be there.
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", loaded)
    shared_bert.to_stock(tiny_model(kind, attention_scheme="standard")).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **{field: "kernels-community/flash-attn2"})
    with pytest.raises(AssertionError, match="a kernel is loaded"):  # so does transformers itself
        AutoModel.from_pretrained(tmp_path)
    model = load_model(str(tmp_path), STOCK_CLASSES.values())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": [5]},
        {"architectures": 5},
        {"architectures": ["GPT2LMHeadModel"]},
        {"model_type": []},
        {"model_type": 5},
    ],
    ids=str,
)
def test_a_config_of_no_model_is_named(tmp_path, fields):
    shared_bert.to_stock(tiny_model("bert", attention_scheme="standard")).save_pretrained(tmp_path)
    change(tmp_path / "config.json", **fields)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        load_model(str(tmp_path), STOCK_CLASSES.values())


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "nothing", "../evil"])
def test_a_quantizer_is_none_or_an_installed_one(saved, kind, method):
    change(saved / "config.json", quantization_config={"quant_method": method, "load_in_8bit": True})
    with pytest.raises((ValueError, ImportError, OSError, RuntimeError)):
        load_model(str(saved), STOCK_CLASSES)


def test_weights_that_are_a_pickle_by_another_name(saved, sentinel):
    torch.save({"weight": Evil(sentinel)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded"):
        AutoModel.from_pretrained(saved)


def test_a_tokenizer_of_somebody_elses_class(tmp_path, tokenizers, sentinel):
    tokenizers["bert"].save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\n")
    change(tmp_path / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(ValueError, match=r"(?s)no tokenizer could be loaded.*trust_remote_code=True"):
        load_tokenizer(str(tmp_path))
