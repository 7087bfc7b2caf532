"""What cannot share is refused by name, before anything is changed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import shared_bert

from ..conftest import tiny_model
from ..processes import run_python
from .architectures import ARCHITECTURES

MASA = {"depth_sharing": "masa", "num_atoms": 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing is shared: give attention_scheme or depth_sharing"),
        (
            {"attention_scheme": "standart"},
            "attention_scheme='standart' is unknown; choose one of standard, symmetric",
        ),
        ({"depth_sharing": "MASA"}, "depth_sharing='MASA' is unknown; choose one of none, masa"),
        ({"depth_sharing": "masa"}, "depth_sharing='masa' needs num_atoms"),
        ({**MASA, "num_groups": 2}, "num_groups=2 does not go with depth_sharing='masa'"),
        ({**MASA, "num_atoms": 5}, "num_atoms=5 must be at least 1 and at most the layers of layers.*q_proj=4"),
        ({"depth_sharing": "low_rank", "rank": 33}, "rank=33 must be at least 1 and at most the width of .*=32"),
        ({**MASA, "atoms": 2}, "atoms: no option of share; valid are num_atoms"),
        ({**MASA, "depth_shared_matrices": "qk"}, "depth_shared_matrices='qk' must be 'qkv' or 'qkvo'"),
        ({**MASA, "targets": ["up_proj", "qproj"]}, "'qproj' fits no matrix of LlamaModel, which has layers.*q_proj"),
        ({**MASA, "targets": ["mlp"]}, "'mlp' fits no matrix"),
        ({"attention_scheme": "symmetric", "targets": ["q_proj"]}, "targets name the matrices of depth_sharing"),
        (
            {**MASA, "attention_scheme": "shared_kv", "targets": ["v_proj"]},
            "attention_scheme='shared_kv' has no matrix layers.*v_proj",
        ),
        ({**MASA, "dictionary_groups": 2}, "dictionary_groups=2 are chosen on inputs: give calibration"),
        ({**MASA, "dictionary_groups": 3}, "dictionary_groups=3 must be at least 1 and at most num_atoms=2"),
        ({**MASA, "spread_rank": True}, "spread_rank=True .*: give rank"),
        ({**MASA, "coefficient_source": "net"}, "coefficient_source='net' is unknown; choose one of direct, network"),
        (
            {**MASA, "coefficient_source": "network"},
            "'network' makes the coefficients of a new 'masa': give initialize",
        ),
        ({**MASA, "initialize": True, "calibration": []}, "initialize=True starts with random matrices"),
        (
            {**MASA, "calibration": []},
            "calibration gives layers.0.self_attn.q_proj 0 inputs of 32 channels: give more",
        ),
        ({**MASA, "calibration": [torch.zeros(1, 2)]}, "a batch of calibration must be a mapping"),
        (
            {**MASA, "calibration": [{"input_ids": torch.tensor([[5, 96]])}]},
            "calibration has the token 96, and the vocabulary 96 tokens: its text is of another tokenizer",
        ),
    ],
)
def test_options(llama, options, said):
    with pytest.raises(ValueError, match=said):
        shared_bert.share(llama, **options)
    assert not hasattr(llama.model, "shared_matrices")


def test_models_that_share_or_are_quantized_already(llama):
    model, _ = shared_bert.share(llama, **MASA)
    with pytest.raises(ValueError, match=r"shares already: dequantize\(\) it first"):
        shared_bert.share(model, **MASA)
    shared_bert.share(model.dequantize(), **MASA)
    with pytest.raises(ValueError, match="SharedBertForMaskedLM shares by its own config: convert it with from_stock"):
        shared_bert.share(tiny_model("bert"), **MASA)


def test_a_quantized_model(llama, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs the package torchao")
    from transformers import TorchAoConfig

    llama.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig())
    )
    with pytest.raises(ValueError, match="quantized by torchao: share the model it was made from"):
        shared_bert.share(quantized, **MASA)


def test_tied_matrices():
    model = ARCHITECTURES["llama"].model()
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight and .*layers.1.* are tied"):
        shared_bert.share(model, **MASA)


def test_unequal_shapes():
    model = ARCHITECTURES["llama"].model()
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40)
    with pytest.raises(ValueError, match=r"layers.\*.mlp.up_proj have different shapes and cannot share.*40.*48"):
        shared_bert.share(model, targets=["up_proj"], **MASA)


def test_unknown_names():
    class Odd(LlamaForCausalLM):
        pass

    model = Odd(LlamaConfig(**ARCHITECTURES["llama"].fields))
    for layer in model.model.layers:
        layer.self_attn.a_proj = layer.self_attn.q_proj
        del layer.self_attn.q_proj
    with pytest.raises(ValueError, match="no attention of several layers was found in LlamaModel"):
        shared_bert.share(model, **MASA)
    shared_bert.share(model, targets=["a_proj"], **MASA)


def test_a_row_makes_names_known(monkeypatch):
    model = ARCHITECTURES["llama"].model()
    for layer in model.model.layers:
        attention = layer.self_attn
        for new, old in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"), ("wo", "o_proj")):
            setattr(attention, new, getattr(attention, old))
            delattr(attention, old)
    row = shared_bert.AttentionNames("wo", "wq", "wk", "wv")
    monkeypatch.setattr(shared_bert.injection.targets, "ATTENTION_NAMES", [row])
    shared, _ = shared_bert.share(model, **MASA)
    assert set(shared.model.shared_matrices) == {"q0", "k0", "v0"}


@pytest.fixture
def folder(llama, tmp_path):
    shared_bert.share(llama, **MASA)[0].save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_of_a_newer_version(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for changes in ({"format": 2}, {"layer_atoms": [1]}):
        path.write_text(json.dumps({**config, "quantization_config": config["quantization_config"] | changes}))
        with pytest.raises(ValueError, match="a newer version of shared_bert has written it; upgrade the package"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_without_what_layers_share(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.shared_matrices.q0.atoms"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model.shared_matrices.q0.atoms, which its layers share"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_of_another_architecture(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"targets": ["blocks.*.attn.q"], "attention": []}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has none of the matrices blocks.\*.attn.q"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_record_is_no_option_of_loading(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load the stock model, and call shared_bert\.share"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=shared_bert.SharingConfig())


@pytest.mark.slow
def test_without_the_package_a_folder_says_what_to_install(folder):
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    run = run_python("-c", code)
    # transformers itself loads on with random matrices, after these words.
    assert "Unknown quantization type, got shared_bert" in run.stdout + run.stderr
    assert "MISSING" in run.stdout + run.stderr
    hint = json.loads((folder / "config.json").read_text())["quantization_config"]["to_load"]
    assert hint == "pip install shared_bert, and import shared_bert before from_pretrained"


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite(name):
    model = ARCHITECTURES["bert"].model()
    getattr(model.base_model.encoder.layer[1].attention.self.key, name).data[0] = torch.nan
    with pytest.raises(ValueError, match=r"layer.1.attention.self.key has weights that are NaN or infinite"):
        shared_bert.share(model, **MASA)


def test_a_single_target_need_not_be_a_list():
    model = ARCHITECTURES["bert"].model()
    shared, _ = shared_bert.share(model, targets="output.dense", depth_sharing="masa", num_atoms=1)
    listed, _ = shared_bert.share(model, targets=["output.dense"], depth_sharing="masa", num_atoms=1)
    assert shared.config.quantization_config.to_dict() == listed.config.quantization_config.to_dict()
