"""Heads are moved before layers share, and attention stays what it was."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig

import shared_bert

from .architectures import ARCHITECTURES, logits

ONE = {"depth_sharing": "sequential", "num_groups": 1, "depth_shared_matrices": "qkvo"}
LAYERS, HEADS, KEYS, HEAD_DIM = 3, 4, 2, 8


def rotation(generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(HEAD_DIM, HEAD_DIM, generator=generator))[0]


def turn_of_pairs(generator) -> torch.Tensor:
    """A rotation of each pair of channels j and j + HEAD_DIM / 2, of a random angle."""
    angles = 6.28 * torch.rand(HEAD_DIM // 2, generator=generator)
    cos, sin = angles.cos().diag(), angles.sin().diag()
    return torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])


@torch.no_grad()
def moved_copies(model, turn_of_logits):
    """Make all layers the first one, with its heads in another order, and turned."""
    generator = torch.Generator().manual_seed(3)
    first, *others = (layer.self_attn for layer in model.model.layers)
    for attention in others:
        order = torch.randperm(KEYS, generator=generator)
        of_logits = torch.stack([turn_of_logits(generator) for _ in range(KEYS)])[:, None]
        of_values = torch.stack([rotation(generator) for _ in range(KEYS)])[:, None]
        for name, turn in (("q", of_logits), ("k", of_logits), ("v", of_values)):
            heads = getattr(first, f"{name}_proj").weight.unflatten(0, (KEYS, -1, HEAD_DIM))
            getattr(attention, f"{name}_proj").weight.copy_((turn.mT @ heads)[order].flatten(0, 2))
        columns = first.o_proj.weight.T.unflatten(0, (KEYS, -1, HEAD_DIM))
        attention.o_proj.weight.copy_((of_values.mT @ columns)[order].flatten(0, 2).T)


def grouped_llama():
    return ARCHITECTURES["llama"].model(num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEYS)


def test_layers_that_differ_by_what_is_free_lose_nothing():
    model, inputs = grouped_llama(), ARCHITECTURES["llama"].inputs()
    moved_copies(model, turn_of_pairs)
    expected = logits(model, inputs)
    shared, _ = shared_bert.share(model, **ONE)
    torch.testing.assert_close(logits(shared, inputs), expected, rtol=1e-4, atol=1e-4)
    _, unaligned = shared_bert.share(model, align=False, **ONE)
    assert min(max(errors) for errors in unaligned.errors.values()) > 0.1


def test_queries_and_keys_turn_only_with_their_positions():
    """Any other rotation of both would change attention between different positions."""
    model, inputs = grouped_llama(), ARCHITECTURES["llama"].inputs()
    moved_copies(model, rotation)
    expected = logits(model, inputs)
    whole = {**ONE, "num_groups": LAYERS}
    torch.testing.assert_close(logits(shared_bert.share(model, **whole)[0], inputs), expected, rtol=1e-4, atol=1e-5)
    errors = shared_bert.share(model, **ONE)[1].errors
    assert max(errors["layers.*.self_attn.q_proj"]) > 0.1
    assert max(errors["layers.*.self_attn.v_proj"]) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_stay(name):
    """With room for all layers, only an alignment that is not exact could change something."""
    model, inputs = ARCHITECTURES[name].model(), ARCHITECTURES[name].inputs()
    # Norms, biases and tables of positions that start at one or zero hide what they tell apart.
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    layers = max(len(part) for part in model.modules() if isinstance(part, nn.ModuleList))
    shared, _ = shared_bert.share(
        model, depth_sharing="masa", num_atoms=layers, depth_shared_matrices="qkvo", align=True
    )
    torch.testing.assert_close(logits(shared, inputs), logits(model, inputs), rtol=1e-3, atol=1e-4)


def test_neighbouring_channels_that_rotate_together_are_told_apart():
    """Cohere rotates the channels 2j and 2j + 1 of a head."""
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CohereConfig(**shape, intermediate_size=32, vocab_size=99)).eval()
    inputs = ARCHITECTURES["llama"].inputs()
    shared, _ = shared_bert.share(model, depth_sharing="masa", num_atoms=3, depth_shared_matrices="qkvo")
    torch.testing.assert_close(logits(shared, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="does not rotate the pairs"):
        shared_bert.share(model, attention_scheme="shared_kv")
