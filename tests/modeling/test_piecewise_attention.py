"""Attention in pieces is attention written out, with its gradients; models use it where torch has no kernel."""

from types import SimpleNamespace

import pytest
import torch

from shared_bert.modeling import attention, piecewise_attention
from shared_bert.modeling.dropout import Noise
from shared_bert.modeling.piecewise_attention import piecewise_attention_forward
from tests.conftest import tiny_model


@pytest.fixture(params=[2**20, 60, 1], ids=["one piece", "some heads", "single heads"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(piecewise_attention, "MAX_LOGITS", request.param)


def masks(kind, batch=3, heads=4, length=5):
    torch.manual_seed(1)
    seen = torch.rand(batch, 1, length, length) < 0.7
    seen |= torch.eye(length, dtype=torch.bool)
    return {
        "none": None,
        "causal": None,
        "rows": seen,
        "one row": seen[:1],
        "heads": seen.expand(-1, heads, -1, -1),
        "added": torch.randn(batch, heads, length, length, dtype=torch.float64),
    }[kind]


def written_out(query, key, value, mask, scaling, is_causal, noise=1.0):
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    logits = query @ key.mT * scaling
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return (logits.softmax(-1) * noise @ value).transpose(1, 2)


def roles(groups=1, batch=3, heads=4, length=5, width=6):
    torch.manual_seed(0)
    leaves = [
        torch.randn(batch, length, h, width, dtype=torch.float64) for h in (heads, heads // groups, heads // groups)
    ]
    return [leaf.transpose(1, 2).requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "rows", "one row", "heads", "added"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_result_and_gradients(pieces, dropout, mask, groups, monkeypatch):
    query, key, value = roles(groups)
    drawn = []
    draw = Noise.draw

    def record(noise, *arguments):
        drawn.append(draw(noise, *arguments))
        return drawn[-1].clone()

    monkeypatch.setattr(Noise, "draw", record)
    module = SimpleNamespace(is_causal=mask == "causal", num_key_value_groups=groups)
    got, weights = piecewise_attention_forward(module, query, key, value, masks(mask), 0.4, dropout)
    assert weights is None
    noise = 1.0
    if dropout:  # the draws are of the heads of each row in turn
        noise = torch.cat(drawn).view(3, 4, 5, 5) * 2**16 / (2**16 - round(dropout * 2**16))
    expected = written_out(query, key, value, masks(mask), 0.4, mask == "causal", noise)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    inputs = query, key, value
    for one, other in zip(*(torch.autograd.grad(t, inputs, upstream) for t in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_texts_do_not_see_each_other(pieces):
    query, key, value = roles(batch=2)
    texts = [(0, slice(0, 2)), (0, slice(2, 5)), (1, slice(0, 4)), (1, slice(4, 5))]
    block = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    for row, tokens in texts:
        block[row, 0, tokens, tokens] = True
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    got, _ = piecewise_attention_forward(module, query, key, value, None, 0.4, texts=texts)
    expected = written_out(query, key, value, block, 0.4, False)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)
    inputs = query, key, value
    for one, other in zip(*(torch.autograd.grad(t, inputs, upstream) for t in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_key_and_value_may_be_one_tensor():
    query, key, _ = roles()
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    got, _ = piecewise_attention_forward(module, query, key, key, None, 0.4)
    expected = written_out(query, key, key, None, 0.4, False)
    for one, other in zip(*(torch.autograd.grad(t.sum(), (query, key)) for t in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_models_attend_in_pieces_only_where_torch_has_no_kernel(kind, input_ids, monkeypatch):
    calls = []

    def record(*arguments, **options):
        calls.append(options)
        return piecewise_attention_forward(*arguments, **options)

    monkeypatch.setattr(attention, "piecewise_attention_forward", record)
    documents = {"document_ids": torch.arange(12).expand(2, 12) // 5}
    for dropout in (0.0, 0.1):
        for training in (False, True):
            for implementation in ("sdpa", "eager"):
                for packed in ({}, documents):
                    model = tiny_model(
                        kind, attention_probs_dropout_prob=dropout, attn_implementation=implementation
                    ).train(training)
                    calls.clear()
                    model(input_ids, **packed)
                    wanted = implementation == "sdpa" and (bool(packed) or (dropout > 0 and training))
                    assert bool(calls) == wanted


def test_training_with_dropout_needs_memory_linear_in_the_length(kind):
    """What autograd keeps of one layer's attention is a multiple of its inputs."""
    model = tiny_model(kind, attention_probs_dropout_prob=0.1, max_position_embeddings=512).train()
    kept = {}
    for length in (128, 512):
        sizes = []
        tokens = torch.zeros(1, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(tokens)
        kept[length] = sum(sizes)
    assert kept[512] < 4.1 * kept[128]


@pytest.mark.parametrize("way", ["compiled layers", "vmap over weights"])
def test_documents_stay_apart_where_pieces_cannot_run(kind, input_ids, way):
    document_ids = torch.arange(12).expand(2, 12) // 5
    expected = tiny_model(kind, attn_implementation="eager")(input_ids, document_ids=document_ids).logits
    model = tiny_model(kind)
    if way == "compiled layers":
        for layer in model.bert.encoder.layer if kind == "bert" else model.transformer.h:
            layer.compile(backend="eager")
        got = model(input_ids, document_ids=document_ids).logits
    else:
        weights = {name: p[None] for name, p in model.named_parameters() if "projection" in name}
        (got,) = torch.func.vmap(
            lambda w: torch.func.functional_call(model, w, (input_ids,), {"document_ids": document_ids}).logits
        )(weights)
    torch.testing.assert_close(got, expected)


def test_document_ids_of_another_shape_are_refused(kind, input_ids):
    with pytest.raises(ValueError, match=r"document_ids of shape \[1, 12\] must have that of the tokens, \[2, 12\]"):
        tiny_model(kind)(input_ids, document_ids=input_ids[:1] * 0)


def test_a_mask_that_learns_gets_its_gradient(input_ids):
    bias = torch.zeros(2, 4, 12, 12, requires_grad=True)
    model = tiny_model("bert", attention_probs_dropout_prob=0.1).train()
    model(input_ids, attention_mask=bias, labels=input_ids).loss.backward()
    assert bias.grad.any()


def test_rows_that_see_nothing_are_no_nan():
    query, key, value = roles()
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    for nothing in (torch.full((1, 1, 5, 5), -torch.inf), torch.zeros(1, 1, 5, 5, dtype=torch.bool)):
        got, _ = piecewise_attention_forward(module, query, key, value, nothing, 0.4)
        assert got.isfinite().all()


def test_half_precision_is_as_exact_as_its_inputs():
    query, key, value = (t.detach().bfloat16() for t in roles(length=64))
    module = SimpleNamespace(is_causal=False, num_key_value_groups=1)
    got, _ = piecewise_attention_forward(module, query, key, value, None, 0.4)
    expected = written_out(query.double(), key.double(), value.double(), None, 0.4, False)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() < 3e-3 * expected.norm()


def test_second_derivatives_are_refused(input_ids):
    model = tiny_model("bert", attention_probs_dropout_prob=0.1).train()
    with pytest.raises(RuntimeError, match='attn_implementation="eager"'):
        torch.autograd.grad(model(input_ids, labels=input_ids).loss, model.bert.parameters(), create_graph=True)
