"""The folded computation is the papers': outputs and gradients, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_bert import SCHEMES, SelfAttention
from tests.conftest import tiny_config
from tests.modeling.literal import literal_attention


def build(scheme, is_causal, **fields):
    torch.manual_seed(0)
    config = tiny_config("bert", attention_scheme=scheme, **fields)
    config._attn_implementation = "eager"
    module = SelfAttention(config, layer_idx=0, is_causal=is_causal).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def outputs_and_gradients(module, x, attend):
    x = x.clone().requires_grad_()
    out = attend(x)
    # The square makes the gradient depend on the output, so that no error can cancel.
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


def assert_same(module, x, allowed):
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)[:, None]
    folded = outputs_and_gradients(module, x, lambda x: module(x, mask)[0])
    literal = outputs_and_gradients(module, x, lambda x: literal_attention(module, x, allowed))
    for got, expected in zip(folded, literal, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
def test_folded_is_literal(scheme, is_causal, attention_bias):
    module = build(scheme, is_causal, attention_bias=attention_bias)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    allowed = torch.ones(2, 7, 7, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    assert_same(module, x, allowed)


@pytest.mark.parametrize("scheme", [name for name, scheme in SCHEMES.items() if scheme.can_group])
@pytest.mark.parametrize("num_key_value_heads", [1, 2])
def test_grouped_queries_are_literal(scheme, num_key_value_heads):
    module = build(scheme, False, num_key_value_heads=num_key_value_heads)
    assert_same(module, torch.randn(2, 5, 32, dtype=torch.float64), torch.ones(2, 5, 5, dtype=torch.bool))


@settings(max_examples=40, deadline=None)
@given(
    scheme=st.sampled_from(list(SCHEMES)),
    heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([1, 2, 3, 8]),
    scale=st.one_of(st.none(), st.floats(0.05, 3)),
    seed=st.integers(0, 2**16),
)
def test_folded_is_literal_for_any_shape(scheme, heads, head_dim, scale, seed):
    module = build(scheme, False, hidden_size=heads * head_dim, num_attention_heads=heads, attention_scale=scale)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, heads * head_dim, dtype=torch.float64, generator=generator)
    # Any pattern of attention, as long as every token sees itself.
    allowed = (torch.rand(1, 4, 4, generator=generator) < 0.5) | torch.eye(4, dtype=torch.bool)
    assert_same(module, x, allowed)


def test_roles_of_one_matrix_are_one_tensor(scheme):
    module = build(scheme, False)
    query, key, value = module.roles(torch.randn(2, 5, 32, dtype=torch.float64))
    assert (key is value) == SCHEMES[scheme].key_is_value
    if scheme in ("symmetric", "unified"):
        assert query is key


def test_projection_has_one_matrix_per_distinct_role():
    matrices = {"standard": 3, "shared": 1, "unified": 1}
    for scheme in SCHEMES:
        assert build(scheme, False).projection.weight.shape == (32 * matrices.get(scheme, 2), 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_attention_one_type(scheme, dtype):
    module = build(scheme, False).float()
    module.config._attn_implementation = "sdpa"
    x = torch.randn(2, 5, 32)
    with torch.autocast("cpu", dtype):
        assert {role.dtype for role in module.roles(x)} == {dtype}
        out = module(x)[0]
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_initial_values():
    def started(scheme, **fields):
        from tests.conftest import tiny_model

        return tiny_model("bert", attention_scheme=scheme, **fields).bert.encoder.layer[0].attention.self

    shared = started("shared", diagonal_init_std=0.0)
    for diagonal in (shared.query_diagonal, shared.key_diagonal, shared.value_diagonal):
        assert (diagonal == 1).all()
    spread = started("shared", diagonal_init_std=0.5, hidden_size=512).query_diagonal
    assert spread.mean().item() == pytest.approx(1, abs=0.1)
    assert spread.std().item() == pytest.approx(0.5, abs=0.1)
    assert (started("pairwise", pairwise_init="identity").pairwise == torch.eye(8)).all()
    assert started("pairwise", hidden_size=128).pairwise.std().item() == pytest.approx(1, abs=0.1)
