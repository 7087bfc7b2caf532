"""Every architecture shares, trains, is saved and loaded by transformers, and multiplies out into the stock model."""

import pytest
import torch

import shared_bert

from .architectures import ARCHITECTURES, logits

SHARINGS = {
    "masa": {"depth_sharing": "masa", "num_atoms": 2, "rank": 2},
    "sequential": {"depth_sharing": "sequential", "num_groups": 2, "depth_shared_matrices": "qkvo"},
    "repeat_all_over": {"depth_sharing": "repeat_all_over", "num_groups": 3},
    "low_rank": {"depth_sharing": "low_rank", "rank": 3, "depth_shared_matrices": "qkvo"},
}
# The others are made of the same parts.
QUICK = {"pairwise", "shared", "query_free", "shared_kv"}
SCHEMES = [
    pytest.param(scheme, marks=() if scheme in QUICK else pytest.mark.slow)
    for scheme in shared_bert.SCHEMES
    if scheme != "standard"
]
FUSED = ("phi3", "gpt_neox", "gpt2", "modernbert", "deberta")
# Schemes that make one role from another, or from the input, where these have different numbers of channels.
UNEQUAL = {
    "llama": {"symmetric", "pairwise", "shared", "unified", "key_free", "value_free"},
    "mistral": {"symmetric", "pairwise", "shared", "unified", "key_free", "value_free"},
    "qwen3": {"symmetric", "pairwise", "shared", "unified", "query_free"},
    "gemma": {"symmetric", "pairwise", "shared", "unified", "query_free", "key_free", "value_free"},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def stock(request):
    """A stock model, its inputs and its logits."""
    model, inputs = ARCHITECTURES[request.param].model(), ARCHITECTURES[request.param].inputs()
    with torch.no_grad():
        return model, inputs, logits(model, inputs)


def check_whole(model, stock_model, inputs, folder):
    """Train a step; save, load and multiply out."""
    model.train()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("shared_matrices", "factors", "ingredient", ".map.")):
            assert parameter.grad is not None, name
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    model.eval()
    with torch.no_grad():
        found = logits(model, inputs)
        model.save_pretrained(folder)
        loaded = type(stock_model).from_pretrained(folder)
        stored = loaded.state_dict()
        assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, stored[name])] == []
        torch.testing.assert_close(logits(loaded, inputs), found)
        plain = loaded.dequantize()
        assert [type(module) for module in plain.modules()] == [type(module) for module in stock_model.modules()]
        torch.testing.assert_close(logits(plain, inputs), found, rtol=1e-4, atol=1e-5)
        plain.save_pretrained(folder / "plain")
        assert "quantization_config" not in (folder / "plain" / "config.json").read_text()
        torch.testing.assert_close(
            logits(type(stock_model).from_pretrained(folder / "plain"), inputs), found, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_depth_sharing(stock, sharing, tmp_path):
    model, inputs, _ = stock
    shared, report = shared_bert.share(model, **SHARINGS[sharing])
    assert report.parameters_after < report.parameters_before
    assert report.total_before - report.total_after == report.parameters_before - report.parameters_after
    assert report.total_after == shared.num_parameters()
    check_whole(shared, model, inputs, tmp_path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(request, stock, scheme, tmp_path):
    model, inputs, _ = stock
    architecture = request.node.callspec.params["stock"]
    options = {"attention_scheme": scheme, "initialize": True}
    if architecture in FUSED:
        with pytest.raises(ValueError, match="needs separate matrices for query, key and value"):
            shared_bert.share(model, **options)
    elif scheme in UNEQUAL.get(architecture, ()):
        with pytest.raises(ValueError, match="channels, and what it is made from has"):
            shared_bert.share(model, **options)
    else:
        shared, report = shared_bert.share(model, **options)
        assert report.total_after == shared.num_parameters() < report.total_before
        check_whole(shared, model, inputs, tmp_path)


@pytest.mark.parametrize("stock", [name for name in ARCHITECTURES if name not in FUSED], indirect=True)
def test_a_scheme_whose_matrices_layers_share(stock, tmp_path):
    model, inputs, _ = stock
    shared, _ = shared_bert.share(
        model, "shared_kv", "masa", num_atoms=2, depth_shared_matrices="qkvo", initialize=True
    )
    check_whole(shared, model, inputs, tmp_path)


@pytest.mark.parametrize("sharing", ["masa", "low_rank"])
def test_all_atoms_or_the_full_rank_keep_the_outputs(stock, sharing):
    model, inputs, expected = stock
    size = {"masa": {"num_atoms": 4}, "low_rank": {"rank": 32}}[sharing]
    shared, report = shared_bert.share(model, depth_sharing=sharing, depth_shared_matrices="qkvo", **size)
    torch.testing.assert_close(logits(shared, inputs), expected, rtol=1e-4, atol=1e-5)
    assert max(error for errors in report.errors.values() for error in errors) < 1e-5
