"""Schemes fitted to attention with rotary positions: exact where they can be, and the best of their form."""

import pytest
import torch
from transformers import AutoModel, CohereConfig, LlavaConfig, PreTrainedModel, RoFormerConfig
from transformers.models.llama.modeling_llama import LlamaAttention

import shared_bert

from .architectures import ARCHITECTURES, logits

SCHEMES = [scheme for scheme in shared_bert.SCHEMES if scheme != "standard"]


def trained(**fields):
    """A model whose matrices are far from their start, with biases."""
    model = ARCHITECTURES["llama"].model(**fields, attention_bias=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def ungrouped():
    return trained(num_key_value_heads=4)


def commuting(model):
    """Keep of an ingredient what commutes with the rotation: one complex factor for the two channels of a plane."""
    with torch.no_grad():
        for layer in model.model.layers:
            for name, parameter in (layer.self_attn.q_proj.ingredient or torch.nn.Module()).named_parameters():
                if name == "pairwise":
                    real, imaginary = (torch.diag_embed(torch.randn(4, 4)) for _ in range(2))
                    rows = torch.cat([real, imaginary], dim=2), torch.cat([-imaginary, real], dim=2)
                    parameter.copy_(torch.cat(rows, dim=1))
                elif name != "value_diagonal":
                    parameter.copy_(torch.randn(4, 1, 4).expand(4, 2, 4).flatten())


@pytest.mark.parametrize(
    ("scheme", "heads"), [*((scheme, 4) for scheme in SCHEMES), ("query_free", 2), ("shared_kv", 2)]
)
def test_a_layer_of_the_scheme_is_fitted_exactly(ungrouped, scheme, heads, inputs):
    torch.manual_seed(0)
    model = ungrouped if heads == 4 else trained(num_key_value_heads=heads)
    own, _ = shared_bert.share(model, scheme, initialize=True, diagonal_init_std=0.3)
    commuting(own)
    with torch.no_grad():
        expected = logits(own, inputs)
        fitted, _ = shared_bert.share(own.dequantize(), scheme, calibration=[inputs] * 3)
        torch.testing.assert_close(logits(fitted, inputs), expected, rtol=1e-3, atol=1e-4)


def planes(weight: torch.Tensor) -> torch.Tensor:
    """The complex columns of a matrix, [hidden, heads, planes]."""
    heads = weight.T.unflatten(1, (4, 2, 4))
    return torch.complex(heads[:, :, 0], heads[:, :, 1])


def error(query: torch.Tensor, key: torch.Tensor, old_query: torch.Tensor, old_key: torch.Tensor) -> torch.Tensor:
    """The mean square of the difference of the logits over inputs of unit covariance and all distances, by plane."""
    old = torch.einsum("ihp,jhp->hpij", planes(old_query), planes(old_key).conj())
    new = torch.einsum("ihp,jhp->hpij", planes(query), planes(key).conj())
    return (old - new).abs().square().sum((-2, -1))


def roles(scheme: str, parameters: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key of a scheme from its free parameters."""
    identity = torch.eye(32, dtype=torch.float64)
    first = parameters[0]
    if scheme == "pairwise":
        turned = planes(first) * torch.complex(parameters[1], parameters[2])
        key = torch.cat([turned.real, turned.imag], dim=2).flatten(1).T
        return first, key
    if scheme == "shared":
        return first * parameters[1][:, None].expand(4, 2, 4).reshape(-1, 1), first
    if scheme == "query_free":
        return identity / 2, first
    if scheme == "key_free":
        return first, identity
    return first, first


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["symmetric", "unified", "pairwise", "shared", "query_free", "key_free"])
def test_no_descent_finds_a_better_layer(scheme):
    model = ARCHITECTURES["llama"].model(num_key_value_heads=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    fitted, _ = shared_bert.share(model, scheme)
    old, new = model.model.layers[0].self_attn, fitted.model.layers[0].self_attn
    old_query, old_key = old.q_proj.weight.detach().double(), old.k_proj.weight.detach().double()
    query, key = (linear.weight.detach().as_subclass(torch.Tensor).double() for linear in (new.q_proj, new.k_proj))
    found = error(query, key, old_query, old_key).detach()
    shapes = {"pairwise": [(4, 4), (4, 4)], "shared": [(4, 4)]}.get(scheme, [])
    generator = torch.Generator().manual_seed(0)
    best = torch.full_like(found, torch.inf)
    for start in (0, 1, 1):  # at random, and near to the fit
        free = key if scheme == "query_free" else query
        parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(32, 32), *shapes]]
        parameters[0] = start * free + (0.3 if start else 1.0) * parameters[0]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(parameters=parameters, optimizer=optimizer):
            optimizer.zero_grad()
            loss = error(*roles(scheme, parameters), old_query, old_key).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        best = torch.minimum(best, error(*roles(scheme, parameters), old_query, old_key).detach())
    assert (found <= best * (1 + 1e-5)).all()
    assert (best <= found * (1 + 1e-2)).any()  # the descent went far enough to say so


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("qwen3", "norms its queries and keys"), ("deberta_v2", "uses queries and keys for positions, too")],
)
def test_what_has_no_fit_says_so(architecture, reason):
    with pytest.raises(ValueError, match=f"'shared_kv' cannot be fitted to a .*, which {reason}.*initialize=True"):
        shared_bert.share(ARCHITECTURES[architecture].model(), "shared_kv")


@pytest.mark.parametrize("config", [CohereConfig, RoFormerConfig])
def test_rotations_of_other_pairs_have_no_fit(config):
    """Cohere rotates the channels 2j and 2j + 1 of a head; RoFormer has its rotation within the class."""
    fields = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
    model = AutoModel.from_config(config(**fields, vocab_size=99))
    with pytest.raises(ValueError, match="does not rotate the pairs of channels"):
        shared_bert.share(model, "shared_kv")


def llava(text_config: dict) -> PreTrainedModel:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vision = {**size, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    config = LlavaConfig(text_config={**size, "vocab_size": 99, **text_config}, vision_config=vision)
    config.image_token_index = 98
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


def test_rope_is_found_within_another_model():
    """The text model of this LLaVA is a Llama: whose values are its keys already loses nothing."""
    model = llava({"model_type": "llama"})
    for module in model.modules():
        if hasattr(module, "v_proj"):
            module.v_proj.load_state_dict(module.k_proj.state_dict())
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    shared, _ = shared_bert.share(model, "shared_kv")
    with torch.no_grad():
        torch.testing.assert_close(shared(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_partial_rotation_is_found_within_another_model():
    with pytest.raises(ValueError, match="rotates a part of each head"):
        shared_bert.share(llava({"model_type": "stablelm"}), "shared_kv")


def test_rope_is_found_in_a_base_class():
    class OwnAttention(LlamaAttention):
        pass

    model = ARCHITECTURES["llama"].model(num_key_value_heads=4)
    expected, _ = shared_bert.share(model, "symmetric")
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    found, _ = shared_bert.share(model, "symmetric")
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
