"""The roles of an attention scheme in stock attention: query, key and value from fewer matrices.

Each `Role` stands where the stock module has the matrix of query, key or value, so all that follows, such as rotary
positions or the norm of a query, acts on the role as it did on the stock model's. The computation is the papers'
literal one. A product that several roles need is computed once.
"""

import torch
from torch import nn

from ..modeling.ingredients import Ingredient
from ..modeling.schemes import Scheme
from .linear import MadeLinear

ROLES = ("query", "key", "value")


class IngredientParameters(nn.Module):
    """The parameters of a scheme's ingredient. It is called, so that hooks can load what is offloaded."""

    def __init__(self, ingredient: Ingredient, heads: int, head_dim: int):
        super().__init__()
        for name, shape in ingredient.shapes(heads, head_dim).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class Role(MadeLinear):
    """The query, key or value of an attention module.

    Args:
        role: "query", "key" or "value".
        scheme: of the attention.
        replaced: the stock module in its place.
        map: the role's matrix, where no other role has it.
        source: the role that has the matrix; None for this one.
        ingredient: the parameters of the scheme's ingredient, where this role has them.
    """

    def __init__(
        self,
        role: str,
        scheme: Scheme,
        replaced: nn.Module,
        map: nn.Module | None,
        source: "Role | None" = None,
        ingredient: IngredientParameters | None = None,
    ):
        super().__init__(replaced, map)
        self.role = role
        self.scheme = scheme
        self.is_input = getattr(scheme, role) == "x"
        # In a tuple, nn.Module does not take another role for a part of this one.
        self.source = (self if source is None else source,)
        self.ingredient = ingredient
        self.readers = {name for name in ROLES if getattr(scheme, name) == getattr(scheme, role)}
        self.kept = None  # the product of this forward, until all readers have it

    @property
    def scale(self) -> float:
        # A factor on the logits is one on the query. (Where the query is normed afterwards it has no effect.)
        return self.scheme.scale if self.role == "query" else 1.0

    def product(self, inputs: torch.Tensor, reader: str) -> torch.Tensor:
        """Return the matrix's result, computed for the first of its readers."""
        if self.kept is not None and self.kept[0] is inputs and reader in self.kept[2]:
            _, product, waiting = self.kept
        else:
            product, waiting = self.map(inputs), self.readers
        waiting = waiting - {reader}
        self.kept = (inputs, product, waiting) if waiting else None
        return product

    def multiply_out(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the role from [out, n] results of its matrix, a row per channel."""
        ingredient = self.source[0].ingredient
        return self.scheme.ingredient.multiply_out(None if ingredient is None else ingredient(), self.role, rows)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.is_input:
            # Under autocast the other roles are not float32, and attention needs one dtype.
            device = inputs.device.type
            if torch.is_autocast_enabled(device):
                inputs = inputs.to(torch.get_autocast_dtype(device))
            return inputs * self.scale
        product = self.source[0].product(inputs, self.role)
        if self.source[0].ingredient is None:
            return product
        return self.multiply_out(product.flatten(0, -2).T).T.unflatten(0, product.shape[:-1]).to(product.dtype)

    def matrix(self):
        if self.is_input:
            return self.scale * torch.eye(self.out_features).to(self.like)
        return self.multiply_out(self.source[0].map.matrix())

    def vector(self):
        if self.is_input or self.source[0].map.bias is None:
            return None
        return self.multiply_out(self.source[0].map.bias[:, None])[:, 0]
