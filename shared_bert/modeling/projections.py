"""The linear maps of an attention layer, by how `depth_sharing` stores their matrices.

A layer has two of them: `projection`, in which the matrices behind query, key and value lie side by side, and
`output`. Where a layer has its own matrices they are `nn.Linear`.
"""

import torch
from torch import nn
from transformers import initialization as init


class UpMatrices(nn.ParameterList):
    """The second factors of `LowRankLinear`: a module that is called, so that hooks can load what is offloaded."""

    __call__ = nn.Module.__call__  # a ParameterList refuses it

    def forward(self, reduced: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        return [nn.functional.linear(part, up) for part, up in zip(reduced, self, strict=True)]


class LowRankLinear(nn.Module):
    """Matrices applied to the same input, each as two factors of low rank: x·A·B.

    Args:
        in_features: channels of the input.
        widths: output channels of each matrix; the result has their sum.
        ranks: the rank of each matrix. Rank 0 gives zeros.
        bias: whether there is one.
        starts_at_zero: start with B at zero, for matrices that are added to others.
    """

    def __init__(
        self, in_features: int, widths: list[int], ranks: list[int], bias: bool = True, starts_at_zero: bool = False
    ):
        super().__init__()
        self.ranks = ranks
        self.starts_at_zero = starts_at_zero
        self.down = nn.Parameter(torch.empty(sum(ranks), in_features))
        self.up = UpMatrices(torch.empty(width, rank) for width, rank in zip(widths, ranks, strict=True))
        self.bias = nn.Parameter(torch.empty(sum(widths))) if bias else None

    def init_weights(self, std: float):
        """Start the entries of each product with the standard deviation `std`."""
        init.normal_(self.down, std=std**0.5)
        for up, rank in zip(self.up, self.ranks, strict=True):
            # An entry of the product is a sum over the rank.
            init.normal_(up, std=0.0 if self.starts_at_zero else (std / max(rank, 1)) ** 0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        parts = self.up(nn.functional.linear(hidden_states, self.down).split(self.ranks, dim=-1))
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        # Autocast leaves a sum in float32.
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def double_weight(self) -> torch.Tensor:
        """Return the product of the factors in float64, [out, in]."""
        downs = self.down.double().split(self.ranks)
        return torch.cat([up.double() @ down for up, down in zip(self.up, downs, strict=True)])


class SharedLinear(nn.Module):
    """A linear map whose matrix `DepthSharing` passes to every call; its bias is the layer's own.

    Args:
        in_features, widths, bias: as of `LowRankLinear`.
        ranks: ranks of what this layer adds to the shared matrices; None or zeros add nothing.
    """

    def __init__(self, in_features: int, widths: list[int], ranks: list[int] | None = None, bias: bool = True):
        super().__init__()
        self.in_features = in_features
        self.out_features = sum(widths)
        self.bias = nn.Parameter(torch.empty(self.out_features)) if bias else None
        self.residual = (
            LowRankLinear(in_features, widths, ranks, False, starts_at_zero=True) if any(ranks or ()) else None
        )

    def init_weights(self, std: float):
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result = nn.functional.linear(hidden_states, weight, self.bias)
        return result if self.residual is None else result + self.residual(hidden_states)


def make_linear(config, layer_idx: int, name: str) -> nn.Module:
    """Return the `projection` or the `output` of a layer, as `config.depth_sharing` stores it."""
    widths = config.matrix_widths(name)
    sharing = config.depth_sharing if name in config.shared_maps else "none"
    if sharing == "none":
        return nn.Linear(config.hidden_size, sum(widths.values()), bias=config.attention_bias)
    cls = LowRankLinear if sharing == "low_rank" else SharedLinear
    ranks = config.matrix_ranks(layer_idx, name)
    return cls(config.hidden_size, list(widths.values()), ranks, bias=config.attention_bias)
