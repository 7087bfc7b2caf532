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
    return [_dense(layer, matrices) for layer, matrices in zip(layers, own_matrices(model), strict=True)]


@torch.no_grad()
def own_matrices(model: PreTrainedModel) -> list[dict[str, Affine]]:
    """Gives the matrices of every layer's scheme by name ("o" is the output's), their storage over the depth apart."""
    layers = attention_layers(model)
    shared = shared_weights(depth_sharing_of(model), len(layers))
    return [_matrices(layer, *weights) for layer, weights in zip(layers, shared, strict=True)]


def _matrices(attention: SelfAttention, projection_weight=None, output_weight=None) -> dict[str, Affine]:
    projection = _affine(attention.projection, projection_weight)
    parts = (tensor.split(attention.widths) for tensor in (projection.weight, projection.bias))
    made = {name: Affine(*part) for name, *part in zip(attention.scheme.matrices, *parts, strict=True)}
    return made | {"o": _affine(attention.output, output_weight)}


def _dense(attention: SelfAttention, made: dict[str, Affine]) -> DenseAttention:
    scheme, head_dim = attention.scheme, attention.head_dim
    output = made["o"]
    identity = torch.eye(len(output.weight)).to(output.weight)
    made = {**made, "x": Affine(identity, torch.zeros_like(identity[0]))}
    query, key, value = made[scheme.query], made[scheme.key], made[scheme.value]
    if scheme.diagonals:
        query, key, value = (
            _scaled(role, diagonal.double())
            for role, diagonal in (
                (query, attention.query_diagonal),
                (key, attention.key_diagonal),
                (value, attention.value_diagonal),
            )
        )
    if scheme.pairwise:
        transposed = attention.pairwise.double().transpose(1, 2)  # k = q·U, and weights are [out, in]
        key = Affine(
            (transposed @ key.weight.unflatten(0, (-1, head_dim))).flatten(0, 1),
            (transposed @ key.bias.unflatten(0, (-1, head_dim, 1))).flatten(),
        )
    groups = attention.num_key_value_groups
    return DenseAttention(
        query=_scaled(query, attention.scaling * head_dim**0.5),
        key=_repeat_heads(key, head_dim, groups),
        value=_repeat_heads(value, head_dim, groups),
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


def _repeat_heads(role: Affine, head_dim: int, groups: int) -> Affine:
    if groups == 1:
        return role
    return Affine(
        *(t.unflatten(0, (-1, head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for t in (role.weight, role.bias))
    )
