"""Attention multiplied out: what a layer of any scheme and any depth sharing does, as stock matrices."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..modeling import SelfAttention
from ..modeling.depth_sharing import DepthSharing, shared_weights
from ..modeling.projections import LowRankLinear, SharedLinear


@dataclass
class Affine:
    """x → weight·x + bias, with `weight` [out, in] and `bias` [out]."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class DenseAttention:
    """A layer's attention as stock computes it: logits scaled by 1/sqrt(head_dim), as many key as query heads."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine


def attention_layers(model: PreTrainedModel) -> list[SelfAttention]:
    """Lists the attention of a `Shared…` model, first layer first."""
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def depth_sharing_of(model: PreTrainedModel) -> DepthSharing | None:
    """Finds what the layers of a `Shared…` model share."""
    return next((module for module in model.modules() if isinstance(module, DepthSharing)), None)


@torch.no_grad()
def dense_layers(model: PreTrainedModel) -> list[DenseAttention]:
    """Multiplies out the attention of every layer of a `Shared…` model, in float64."""
    layers = attention_layers(model)
    shared = shared_weights(depth_sharing_of(model), len(layers))
    return [_dense(layer, *weights) for layer, weights in zip(layers, shared, strict=True)]


def _dense(attention: SelfAttention, projection_weight=None, output_weight=None) -> DenseAttention:
    config, scheme, head_dim = attention.config, attention.scheme, attention.head_dim
    projection = _affine(attention.projection, projection_weight)
    made = {
        name: Affine(weight, bias)
        for name, weight, bias in zip(
            scheme.matrices,
            projection.weight.split(attention.widths),
            projection.bias.split(attention.widths),
            strict=True,
        )
    }
    identity = torch.eye(config.hidden_size, dtype=torch.float64, device=projection.weight.device)
    made["x"] = Affine(identity, torch.zeros_like(identity[0]))
    # An ingredient acts on the channels of a role, and so on the bias as on one more column of the weight.
    roles = (torch.column_stack([made[name].weight, made[name].bias]) for name in scheme.roles)
    own = {name: getattr(attention, name).double() for name in scheme.ingredient.shapes(config)}
    query, key, value = (Affine(role[:, :-1], role[:, -1]) for role in scheme.ingredient.multiply_out(own, *roles))
    groups = attention.num_key_value_groups
    return DenseAttention(
        query=_scaled(query, attention.scaling * head_dim**0.5),
        key=_repeat_heads(key, head_dim, groups),
        value=_repeat_heads(value, head_dim, groups),
        output=_affine(attention.output, output_weight),
    )


def _affine(linear: torch.nn.Module, shared_weight: torch.Tensor | None) -> Affine:
    if isinstance(linear, SharedLinear):
        weight = shared_weight.double()
        if linear.residual is not None:
            weight = weight + linear.residual.double_weight()
    elif isinstance(linear, LowRankLinear):
        weight = linear.double_weight()
    else:
        weight = linear.weight.double()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.double()
    return Affine(weight, bias)


def _scaled(role: Affine, factor: torch.Tensor | float) -> Affine:
    factor = torch.as_tensor(factor, dtype=torch.float64, device=role.bias.device)
    return Affine(factor[..., None] * role.weight, factor * role.bias)


def _repeat_heads(role: Affine, head_dim: int, groups: int) -> Affine:
    if groups == 1:
        return role
    return Affine(
        *(t.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for t in (role.weight, role.bias))
    )
