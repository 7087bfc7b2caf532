"""Attention multiplied out: a layer of any scheme and any depth sharing as stock matrices."""

from dataclasses import dataclass, field

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
class SchemeLayer:
    """The parameters of a layer: its matrices by name ("o" is the output's), and those of its scheme's ingredient."""

    matrices: dict[str, Affine]
    ingredient: dict[str, torch.Tensor] = field(default_factory=dict)
    head_order: torch.Tensor | None = None  # the stock layer's head at each place; None keeps the order


@dataclass
class DenseAttention:
    """A layer's attention as stock computes it: logits scaled by 1/sqrt(head_dim), as many key as query heads."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine


def attention_layers(model: PreTrainedModel) -> list[SelfAttention]:
    """List the attention of a `Shared…` model, first layer first."""
    return [module for module in model.modules() if isinstance(module, SelfAttention)]


def depth_sharing_of(model: PreTrainedModel) -> DepthSharing | None:
    """Return what the layers of a `Shared…` model share, or None."""
    return next((module for module in model.modules() if isinstance(module, DepthSharing)), None)


@torch.no_grad()
def scheme_layers(model: PreTrainedModel) -> list[SchemeLayer]:
    """Return the parameters of every layer's scheme, in float64, however they are stored over the depth."""
    layers = attention_layers(model)
    shared = shared_weights(depth_sharing_of(model), len(layers))
    return [_scheme_layer(layer, *weights) for layer, weights in zip(layers, shared, strict=True)]


def _scheme_layer(attention: SelfAttention, projection_weight=None, output_weight=None) -> SchemeLayer:
    projection = _affine(attention.projection, projection_weight)
    parts = (tensor.split(attention.widths) for tensor in (projection.weight, projection.bias))
    matrices = {name: Affine(*part) for name, *part in zip(attention.scheme.matrices, *parts, strict=True)}
    matrices["o"] = _affine(attention.output, output_weight)
    return SchemeLayer(matrices, {name: p.double() for name, p in attention.ingredient_parameters.items()})


@torch.no_grad()
def dense_layers(model: PreTrainedModel) -> list[DenseAttention]:
    """Multiply out the attention of every layer of a `Shared…` model, in float64."""
    return [_dense(*layer) for layer in zip(attention_layers(model), scheme_layers(model), strict=True)]


def _dense(attention: SelfAttention, layer: SchemeLayer) -> DenseAttention:
    scheme, head_dim, output = attention.scheme, attention.head_dim, layer.matrices["o"]
    identity = torch.eye(len(output.weight)).to(output.weight)
    made = {**layer.matrices, "x": Affine(identity, torch.zeros_like(identity[0]))}
    # An ingredient acts on the channels of a role, and so on the bias as on one more column of the weight.
    query, key, value = (
        scheme.ingredient.multiply_out(
            layer.ingredient, role, torch.column_stack([made[name].weight, made[name].bias])
        )
        for role, name in zip(("query", "key", "value"), scheme.roles, strict=True)
    )
    query, key, value = (Affine(role[:, :-1], role[:, -1]) for role in (query, key, value))
    groups = attention.num_key_value_groups
    return DenseAttention(
        query=_scaled(query, attention.scaling * head_dim**0.5),
        key=repeat_heads(key, head_dim, groups),
        value=repeat_heads(value, head_dim, groups),
        output=output,
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


def repeat_heads(role: Affine, head_dim: int, groups: int) -> Affine:
    """Repeat each head of a grouped key or value for every query head of its group."""
    if groups == 1:
        return role
    return Affine(
        *(t.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for t in (role.weight, role.bias))
    )
