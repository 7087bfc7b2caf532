"""The names of a stock layer's matrices where a layer of this package names them otherwise."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class StockName:
    """A linear map of ours, and the stock modules whose matrices lie side by side in it.

    A layer lists its own as `stock_names`, its attention's projection first.
    """

    ours: str
    stock: tuple[str, ...]
    is_transposed: bool = False  # whether stock has its matrices as [in, out]

    def oriented(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if self.is_transposed and tensor.ndim == 2 else tensor


def read_stock_names(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args):
    """Rename a stock layer's entries of `state_dict` in place: a `load_state_dict` hook of ``standard`` layers."""
    if f"{prefix}{module.stock_names[0].stock[0]}.weight" not in state_dict:
        return
    for name in module.stock_names:
        for kind in ("weight", "bias"):
            parts = [state_dict.pop(f"{prefix}{stock}.{kind}") for stock in name.stock]
            state_dict[f"{prefix}{name.ours}.{kind}"] = torch.cat([name.oriented(part) for part in parts])


def write_stock_names(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str):
    """Rename a ``standard`` layer's entries of `state_dict` to stock's in place; missing biases stay missing."""
    for name in module.stock_names:
        for kind in ("weight", "bias"):
            if (tensor := state_dict.pop(f"{prefix}{name.ours}.{kind}", None)) is not None:
                for stock, part in zip(name.stock, tensor.chunk(len(name.stock)), strict=True):
                    state_dict[f"{prefix}{stock}.{kind}"] = name.oriented(part)
