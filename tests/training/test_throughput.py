"""The arithmetic of training, counted against formulas written out by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from shared_bert import SharedBertConfig, SharedGptConfig
from shared_bert.training import peak_flops, training_flops_per_token

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 3, 64, 4, 100, 16


@pytest.mark.parametrize(
    ("scheme", "qkv"),
    [("standard", 3 * WIDTH**2), ("shared", WIDTH**2), ("pairwise", 2 * WIDTH**2 + WIDTH**2 // HEADS)],
)
def test_masked_model(scheme, qkv):
    config = SharedBertConfig(
        attention_scheme=scheme,
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        vocab_size=VOCABULARY,
    )
    layer = qkv + 9 * WIDTH**2 + 2 * LENGTH * WIDTH
    head = WIDTH**2 + WIDTH * VOCABULARY
    model = AutoModelForMaskedLM.from_config(config)
    assert training_flops_per_token(model, LENGTH, 0.25) == 6 * (LAYERS * layer + head / 4)


def test_causal_model():
    config = SharedGptConfig(
        num_hidden_layers=LAYERS,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        vocab_size=VOCABULARY,
    )
    layer = 2 * WIDTH**2 + 9 * WIDTH**2 + 2 * LENGTH * WIDTH
    model = AutoModelForCausalLM.from_config(config)
    assert training_flops_per_token(model, LENGTH) == 6 * (LAYERS * layer + WIDTH * VOCABULARY)


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForCausalLM])
@pytest.mark.parametrize("matrices", ["qkv", "qkvo"])
def test_depth_sharing(auto_class, matrices):
    """Whoever shares a matrix computes as much as who has his own; the factors of a low rank take less."""

    def flops(**sharing):
        config_class = SharedBertConfig if auto_class is AutoModelForMaskedLM else SharedGptConfig
        config = config_class(
            attention_scheme="standard",
            num_hidden_layers=LAYERS,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            vocab_size=VOCABULARY,
            **sharing,
        )
        return training_flops_per_token(auto_class.from_config(config), LENGTH)

    own = flops()
    number = len(matrices) * LAYERS
    common = {"depth_shared_matrices": matrices}
    masa = {"depth_sharing": "masa", "num_atoms": 2, **common}
    assert flops(**masa) == flops(**masa, coefficient_source="network") == own
    for depth_sharing in ("sequential", "repeat_all_over"):
        assert flops(depth_sharing=depth_sharing, num_groups=2, **common) == own
    factors = 6 * number * 2 * 5 * WIDTH
    assert flops(**masa, rank=5) == own + factors
    assert flops(depth_sharing="low_rank", rank=5, **common) == own - 6 * number * WIDTH**2 + factors


@pytest.mark.parametrize(
    ("name", "flops"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)],
)
def test_data_sheets(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == flops


def test_other_devices_are_measured():
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e15
