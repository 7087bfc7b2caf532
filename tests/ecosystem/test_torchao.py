"""Int8 weights by torchao: what is quantised, and how far the logits move."""

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig

import shared_bert

from .conftest import random_model

quantization = pytest.importorskip("torchao.quantization", reason="needs the package torchao")


def is_quantized(module):
    return isinstance(module, nn.Linear) and isinstance(module.weight, quantization.Int8Tensor)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8(kind, attention, config, padded_batch):
    model = random_model(kind, **attention)
    shared_bert.fix_coefficients(model)
    with torch.no_grad():
        expected = model(**padded_batch).logits
        quantization.quantize_(model, getattr(quantization, config)())
        got = model(**padded_batch).logits
    assert all(is_quantized(module) for module in model.modules() if isinstance(module, nn.Linear))
    # A row's step is 1/127 of its largest entry, so rounding moves an entry by a few thousandths of the typical one:
    # about 1 % of the logits of two layers.
    is_text = padded_batch["attention_mask"] == 1
    distance = (got - expected)[is_text].norm() / expected[is_text].norm()
    assert 0 < distance < 0.03


def test_matrices_shared_over_the_depth_stay_float(attention, kind):
    """torchao takes `nn.Linear` only; that is also what the networks are that make coefficients while training."""
    model = random_model(kind, **attention)
    shared_bert.fix_coefficients(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    own = ("depth_sharing", ".down", ".up.", "pairwise", "embeddings", "wte", "wpe")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert isinstance(parameter, quantization.Int8Tensor) != any(part in name for part in own), name


def test_load_time_quantization_is_saved_and_loaded(kind, attention, padded_batch, tmp_path):
    model = random_model(kind, **attention)
    model.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    quantized = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    with torch.no_grad():
        expected, got = (m(**padded_batch).logits for m in (model, quantized))
        assert 0 < (got - expected).norm() / expected.norm() < 0.03
        quantized.save_pretrained(tmp_path / "int8")
        loaded = type(model).from_pretrained(tmp_path / "int8")
        stored = quantized.state_dict()
        for name, tensor in loaded.state_dict().items():
            parts = [tensor] if type(tensor) is torch.Tensor else [tensor.qdata, tensor.scale]
            expected = stored[name]
            of_stored = [expected] if type(tensor) is torch.Tensor else [expected.qdata, expected.scale]
            assert all(map(torch.equal, parts, of_stored)), name
        torch.testing.assert_close(loaded(**padded_batch).logits, got)


def test_gradients_pass_through_a_quantized_head(kind, input_ids):
    """As in training adapters on a quantised model."""
    model = random_model(kind).train()
    exact = model(input_ids, labels=input_ids).loss
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    loss = model(input_ids, labels=input_ids).loss
    assert 0 < (loss - exact).abs() < 0.01
    loss.backward()
    assert model.get_input_embeddings().weight.grad.any()
