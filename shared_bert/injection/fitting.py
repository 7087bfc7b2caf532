"""Shared matrices and schemes fitted to a stock model's, by the code that converts to this package's models."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..conversion.dense import Affine, DenseAttention, SchemeLayer, repeat_heads
from ..conversion.depth_fitting import DictionaryGroups, Factors, fit_atoms, low_rank_factors
from ..conversion.fitting import Metric, fit_scheme
from ..conversion.rotary_fitting import fit_rotary_scheme
from ..modeling import SCHEMES, Scheme
from .linear import MadeLinear, join_rows, split_rows
from .sharing_config import SharingConfig


@dataclass
class TargetFit:
    """What takes the place of one matrix in all layers.

    Attributes:
        shared: of each part of its rows (see `row_parts`) the atoms [atoms, width, in] and the coefficients
            [layers, atoms].
        factors: of each layer, by falling gain (see `low_rank_factors`); empty where there are none.
    """

    shared: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)


@dataclass
class HeadShape:
    """What `fit_scheme` asks of a config."""

    attention_scheme: str
    num_attention_heads: int
    num_key_value_heads: int
    attention_scale: float | None = None

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.attention_scheme]


def read_affine(linear: nn.Module) -> Affine:
    """Return the map of an `nn.Linear` or a `Conv1D`, or within what stands for one, in float64.

    A missing bias is zeros; a scheme's ingredient is no part of the map.
    """
    if isinstance(linear, MadeLinear):
        weight, bias = linear.map.matrix(), linear.map.bias
    else:
        weight, bias = linear.weight, linear.bias
    weight = (weight.T if isinstance(linear, Conv1D) else weight).double()
    return Affine(weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.double())


def write_affine(linear: nn.Module, affine: Affine):
    """Set the map of an `nn.Linear`, a `Conv1D` or an `OwnMap`.

    Raises:
        ValueError: the map needs a bias that the module does not have.
    """
    linear.weight.copy_(affine.weight.T if isinstance(linear, Conv1D) else affine.weight)
    if linear.bias is not None:
        linear.bias.copy_(affine.bias)
    elif affine.bias.any():
        raise ValueError("the fitted matrix needs a bias, which this architecture does not have in its place")


def fit_depth(
    weights: list[torch.Tensor],
    config: SharingConfig,
    widths: list[int],
    heads: int | None,
    groups: DictionaryGroups,
    inputs: list[torch.Tensor] | None,
    same_inputs: bool,
) -> TargetFit:
    """Fit what `config` shares to one matrix of all layers.

    Args:
        weights: [out, in] of each layer.
        widths, heads: of its rows (see `row_parts`).
        groups: of ``masa``'s dictionary.
        inputs: the autocorrelation of each layer's inputs, [in, in]; None takes the identity.
        same_inputs: whether the channels of the inputs mean the same in every layer, so that the mean of `inputs` may
            weigh what the layers share.
    """
    fit = TargetFit()
    remainders = weights
    if config.depth_sharing != "low_rank":
        root = Metric.of(torch.stack(inputs).mean(0)).root if inputs is not None and same_inputs else None
        parts = zip(*(split_rows(weight, widths, heads) for weight in weights), strict=True)
        fit.shared = [fit_atoms(torch.stack(part), config, groups, root) for part in parts]
        remainders = [weight - shared_matrix(fit, heads, layer) for layer, weight in enumerate(weights)]
    if config.rank is not None:
        of_inputs = [None] * len(weights) if inputs is None else inputs
        fit.factors = [low_rank_factors(*layer) for layer in zip(remainders, weights, of_inputs, strict=True)]
    return fit


def shared_matrix(fit: TargetFit, heads: int | None, layer: int) -> torch.Tensor:
    """Return what a layer takes of the shared matrices, [out, in]."""
    return join_rows([torch.einsum("s,swd->wd", c[layer], atoms) for atoms, c in fit.shared], heads)


def dense_attention(roles: list[Affine], output: Affine, heads: int) -> DenseAttention:
    """Return a layer with as many key as query heads; `roles` are its query, key and value."""
    query, key, value = roles
    head_dim = len(query.weight) // heads
    groups = len(query.weight) // len(key.weight)
    return DenseAttention(query, *(repeat_heads(role, head_dim, groups) for role in (key, value)), output)


def fit_roles(
    roles: list[Affine],
    output: Affine,
    attention_scheme: str,
    heads: int,
    inputs: torch.Tensor | None,
    is_rotary: bool,
) -> SchemeLayer:
    """Fit a scheme to a layer's query, key, value and output matrices; see `fit_scheme` and `fit_rotary_scheme`."""
    query, key, _ = roles
    shape = HeadShape(attention_scheme, heads, heads * len(key.weight) // len(query.weight))
    fit = fit_rotary_scheme if is_rotary else fit_scheme
    return fit(dense_attention(roles, output, heads), shape, inputs)
