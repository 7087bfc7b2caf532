"""What `share` fits to a trained model is what conversion to this package's models fits."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import shared_bert

from .architectures import ARCHITECTURES, logits


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**ARCHITECTURES["bert"].fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, too
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, 96, (4, 12), generator=generator) for _ in range(3)]
    masks = [torch.ones_like(row) for row in rows]
    masks[0][1, 7:] = 0
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(rows, masks, strict=True)]


CASES = [
    *({"attention_scheme": scheme} for scheme in shared_bert.SCHEMES if scheme != "standard"),
    {"depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "masa", "num_atoms": 2, "rank": 3, "spread_rank": True, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "sequential", "num_groups": 2},
    {"depth_sharing": "low_rank", "rank": 5, "depth_shared_matrices": "qkvo"},
    {"attention_scheme": "shared_kv", "depth_sharing": "masa", "num_atoms": 2},
]


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(map(str, options.values())))
def test_as_conversion_does(bert, batches, options, is_calibrated, align):
    options = {**options, "calibration": batches if is_calibrated else None, "align": align}
    converted, _ = shared_bert.from_stock(bert, **options)
    shared, report = shared_bert.share(bert, **options)
    inputs = {"input_ids": batches[1]["input_ids"]}
    # Of a scheme whose layers share, the inputs are measured on another model.
    tolerance = (5e-2 if align else 5e-3) if {"attention_scheme", "depth_sharing"} <= options.keys() else 1e-4
    torch.testing.assert_close(logits(shared, inputs), logits(converted, inputs), rtol=1e-3, atol=tolerance)
    assert shared.num_parameters() == report.total_after


def test_what_is_masked_does_not_count(bert, batches):
    """Packed text and masks say the same; what stands at the padding is not seen."""
    options = {"depth_sharing": "low_rank", "rank": 4}
    expected, _ = shared_bert.share(bert, calibration=batches, **options)
    changed = batches[0]["input_ids"].clone()
    changed[1, 7:] = 5
    packed = [{"input_ids": changed, "document_ids": batches[0]["attention_mask"] - 1}, *batches[1:]]
    found, _ = shared_bert.share(bert, calibration=packed, **options)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_conv1d_is_fitted_as_three_matrices(batches):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64)).eval()
    options = {"depth_sharing": "masa", "num_atoms": 2, "rank": 4, "calibration": batches}
    converted, _ = shared_bert.from_stock(gpt2, align=False, depth_shared_matrices="qkvo", **options)
    shared, _ = shared_bert.share(gpt2, targets=["c_attn", "attn.c_proj"], **options)
    # Factors are of the whole fused matrix there, and of its three parts here.
    for matrix, name in zip(converted.transformer.depth_sharing.values(), ("q0", "k0", "v0", "o0"), strict=True):
        found = shared.transformer.shared_matrices[name]
        made = [torch.einsum("ls,swd->lwd", m.coefficients, m.atoms) for m in (matrix, found)]
        torch.testing.assert_close(*made, rtol=1e-3, atol=1e-5)


def test_what_each_matrix_reads_is_measured():
    """In attention to another sequence the query reads one, key and value the other, each with its own mask."""
    torch.manual_seed(0)
    shape = {"d_model": 16, "vocab_size": 99, "max_position_embeddings": 64, "dropout": 0.0}
    side = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
    sizes = {f"{name}_{what}": number for name in ("encoder", "decoder") for what, number in side.items()}
    bart = BartModel(BartConfig(**shape, **sizes)).eval()
    generator = torch.Generator().manual_seed(2)
    ids, decoder_ids = torch.randint(3, 96, (2, 12, 9), generator=generator)
    mask, decoder_mask = (torch.arange(9) < torch.randint(4, 9, (12, 1), generator=generator) for _ in range(2))
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    batch |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask.long()}
    seen = {}

    def watch(name):
        return bart.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.update({name: args[0]}))

    attention = "decoder.layers.1.encoder_attn"
    hooks = [watch(f"{attention}.{role}_proj") for role in "qkv"]
    with torch.no_grad():
        bart(**batch)
    for hook in hooks:
        hook.remove()
    shared, report = shared_bert.share(bart, depth_sharing="low_rank", rank=4, calibration=[batch])
    for role, of_role in (("q", decoder_mask), ("k", mask), ("v", mask)):
        name = f"{attention}.{role}_proj"
        inputs = seen[name][of_role].double()
        old, new = (side.get_submodule(name).weight.double() for side in (bart, shared))
        error = ((new - old) @ inputs.T).norm() / (old @ inputs.T).norm()
        assert report.errors[f"decoder.layers.*.encoder_attn.{role}_proj"][1] == pytest.approx(float(error), rel=1e-3)


def test_models_without_a_table_of_tokens_are_calibrated():
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2Model(Wav2Vec2Config(**fields, **convolutions, **positions)).eval()
    batch = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}
    _, report = shared_bert.share(model, depth_sharing="low_rank", rank=8, calibration=[batch])
    assert 0 < max(report.errors["encoder.layers.*.attention.q_proj"]) < 1
