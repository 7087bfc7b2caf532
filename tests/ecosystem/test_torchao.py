"""Int8 weights by torchao: what is quantised, and how far the logits move."""

import pytest
import torch
from torch import nn

import shared_bert

from .conftest import random_model

quantization = pytest.importorskip("torchao.quantization", reason="tests torchao")


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


def test_matrices_shared_over_the_depth_stay_float(kind):
    """torchao takes `nn.Linear` only. `to_stock` writes them out first, and then everything is quantised."""
    fields = {"depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo"}
    model = random_model(kind, **fields)
    stock = shared_bert.to_stock(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    shared = [
        name for name, module in model.named_modules() if name.endswith(("projection", "attn.output", "self.output"))
    ]
    assert len(shared) == 4
    assert not any(is_quantized(model.get_submodule(name)) for name in shared)
    for name, parameter in model.named_parameters():
        if "depth_sharing" in name:
            assert not isinstance(parameter, quantization.Int8Tensor)
    if kind == "bert":
        quantization.quantize_(stock, quantization.Int8WeightOnlyConfig())
        assert is_quantized(stock.bert.encoder.layer[0].attention.self.query)
