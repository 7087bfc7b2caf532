"""Linear maps that make their matrices when they are called.

`MadeLinear` stands in the stock module's place. It is an `nn.Linear`, so that PEFT and others find it, but has no
parameters: these belong to the map within, which is an `OwnMap` or a `SharedMap`.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..modeling.depth_sharing import SharedMatrix
from ..modeling.projections import LowRankLinear


def join_rows(parts: list[torch.Tensor], heads: int | None) -> torch.Tensor:
    """Put matrices [width, in] one below the other, or head by head if their number is given."""
    if len(parts) == 1:
        return parts[0]
    if heads is None:
        return torch.cat(parts)
    return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)


def split_rows(matrix: torch.Tensor, widths: list[int], heads: int | None) -> list[torch.Tensor]:
    """Return the parts [width, …] that `join_rows` puts together."""
    if heads is None:
        return list(matrix.split(widths))
    parts = matrix.unflatten(0, (heads, -1)).split([width // heads for width in widths], dim=1)
    return [part.flatten(0, 1) for part in parts]


class MadeTensor(torch.Tensor):
    """A value that is made from parameters. Writing into it would change nothing."""

    @property
    def data(self):
        raise TypeError(
            "this matrix is made from others and cannot be replaced: call dequantize() on the model first "
            "(before adapters are added, if they are to be merged)"
        )


def made(value: torch.Tensor) -> torch.Tensor:
    """Return a copy that says so if it is written into."""
    return value.clone().as_subclass(MadeTensor)


class OwnMap(nn.Module):
    """The matrix and the bias of a stock module.

    Args:
        replaced: an `nn.Linear` or a `Conv1D`.
    """

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.weight = replaced.weight
        if isinstance(replaced, Conv1D):
            self.weight = nn.Parameter(replaced.weight.T.contiguous())
        self.bias = replaced.bias

    def matrix(self) -> torch.Tensor:
        """Return the matrix [out, in]."""
        return self.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


class SharedMap(nn.Module):
    """A linear map whose matrix comes from matrices that layers share, and factors of its own.

    Args:
        replaced: the stock module in its place, whose bias it keeps.
        dictionaries: the shared matrices whose results lie one below the other. They belong to the model; none if the
            matrix is only the product of its factors.
        layer: the layer's number in them.
        rank: of the factors' product; 0 for none.
        heads: if the rows of the results alternate head by head, the number of heads.
    """

    def __init__(
        self, replaced: nn.Module, dictionaries: list[SharedMatrix], layer: int, rank: int, heads: int | None
    ):
        super().__init__()
        self.out_features, self.in_features = features(replaced)
        self.bias = replaced.bias
        self.dictionaries = (dictionaries,)  # in a tuple, nn.Module does not take them for its own
        self.layer = layer
        self.heads = heads
        self.factors = None
        if rank or not dictionaries:
            self.factors = LowRankLinear(
                self.in_features, [self.out_features], [rank], bias=False, starts_at_zero=bool(dictionaries)
            ).to(replaced.weight)

    def shared_matrix(self) -> torch.Tensor:
        return join_rows([matrix(self.layer) for matrix in self.dictionaries[0]], self.heads)

    def matrix(self) -> torch.Tensor:
        """Return the matrix [out, in]."""
        weight = 0 if self.factors is None else self.factors.double_weight().to(self.factors.down.dtype)
        return weight + self.shared_matrix() if self.dictionaries[0] else weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.dictionaries[0]:
            result = self.factors(inputs)
            return result if self.bias is None else result + self.bias.to(result.dtype)  # also under autocast
        weight = self.shared_matrix().to(inputs.device)  # with device_map="auto" it may lie on another one
        result = nn.functional.linear(inputs, weight, self.bias)
        return result if self.factors is None else result + self.factors(inputs)


def features(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of output and input channels of an `nn.Linear` or a `Conv1D`."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


class MadeLinear(nn.Linear):
    """A map in the place of a stock linear map.

    Args:
        replaced: the stock module, an `nn.Linear` or a `Conv1D`.
        map: what it computes.
    """

    _is_hf_initialized = True  # stock models would initialise its weight

    def __init__(self, replaced: nn.Module, map: nn.Module | None):
        nn.Module.__init__(self)
        self.was_conv1d = isinstance(replaced, Conv1D)
        self.out_features, self.in_features = features(replaced)
        self.had_bias = replaced.bias is not None
        self.map = map

    def matrix(self) -> torch.Tensor:
        """Return the matrix [out, in]."""
        return self.map.matrix()

    def vector(self) -> torch.Tensor | None:
        """Return the bias [out], or None."""
        return self.map.bias

    @property
    def weight(self) -> torch.Tensor:
        return made(self.matrix())

    @property
    def bias(self) -> torch.Tensor | None:
        vector = self.vector()
        return None if vector is None else made(vector)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.map(inputs)

    @torch.no_grad()
    def multiplied_out(self) -> nn.Module:
        """Return the stock module with this matrix."""
        weight, bias = self.matrix(), self.vector()
        options = {"device": weight.device, "dtype": weight.dtype}
        if self.was_conv1d:
            stock = Conv1D(self.out_features, self.in_features).to(**options)
            weight = weight.T
        else:
            stock = nn.Linear(self.in_features, self.out_features, bias=self.had_bias, **options)
        stock.weight.copy_(weight)
        if stock.bias is not None:
            stock.bias.copy_(bias) if bias is not None else stock.bias.zero_()
        return stock.train(self.training)
