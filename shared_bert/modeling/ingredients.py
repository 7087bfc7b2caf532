"""The ingredients of schemes: what they have in addition to matrices and roles.

An ingredient defines its parameters: shapes, initialisation, folding, multiplying out, and how they change when a head
is rotated or moved. The parameters themselves belong to a layer's attention, under the names given by `shapes`.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import initialization as init

Parameters = Mapping[str, torch.Tensor]


class Ingredient:
    """No ingredient: the roles are the matrices' results. Subclasses override what they change."""

    words = ""  # for a model card
    can_turn = True  # whether the query and key of a head, or its value and output, may be rotated together

    def shapes(self, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a layer, by its name."""
        return {}

    def init_weights(self, parameters: Parameters, config):
        """Start the parameters as `config.diagonal_init_std` or `pairwise_init` say; loaded ones are left alone."""

    def fold_query(self, attention: nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Return the query [batch, heads, seq, head_dim] that gives the scheme's logits with the unchanged key."""
        return query

    def fold_context(self, attention: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """Return the context [batch, seq, hidden] of the scheme's value, from that of the unchanged value."""
        return context

    def multiply_out(self, parameters: Parameters, role: str, rows: torch.Tensor) -> torch.Tensor:
        """Return the "query", "key" or "value" as the paper defines it, from [hidden, n], one row per channel."""
        return rows

    def turn(self, parameters: Parameters, turn: torch.Tensor) -> Parameters:
        """Return the parameters for heads whose query and key are rotated by `turn` [heads, head_dim, head_dim]."""
        return parameters

    def reorder(self, parameters: Parameters, order: torch.Tensor) -> Parameters:
        """Return the parameters for heads in another order, [heads]."""
        return parameters


class Diagonals(Ingredient):
    """d_q, d_k and d_v scale the channels of query, key and value: [hidden] each.

    The logits depend on d_q ⊙ d_k only, so the query carries both and the key stays as it is. d_v passes through the
    weighted mean, and scales the input of the output matrix.
    """

    words = "diagonals scale the channels of each role"
    can_turn = False  # each channel has its own weight

    def shapes(self, heads, head_dim):
        return dict.fromkeys(("query_diagonal", "key_diagonal", "value_diagonal"), (heads * head_dim,))

    def init_weights(self, parameters, config):
        for parameter in parameters.values():
            init.normal_(parameter, mean=1.0, std=config.diagonal_init_std)

    def fold_query(self, attention, query):
        diagonal = (attention.query_diagonal * attention.key_diagonal).to(query.dtype)
        return query * diagonal.view(-1, 1, attention.head_dim)

    def fold_context(self, attention, context):
        return context * attention.value_diagonal.to(context.dtype)

    def multiply_out(self, parameters, role, rows):
        return parameters[f"{role}_diagonal"][:, None] * rows

    def reorder(self, parameters, order):
        return {name: p.unflatten(0, (len(order), -1))[order].flatten() for name, p in parameters.items()}


class Pairwise(Ingredient):
    """k = q·U, with one U [head_dim, head_dim] per head.

    Since q·(q·U)ᵀ = (q·Uᵀ)·qᵀ, U is applied to the query, and the key is the projection itself.
    """

    words = "a matrix per head stands between query and key"

    def shapes(self, heads, head_dim):
        return {"pairwise": (heads, head_dim, head_dim)}

    def init_weights(self, parameters, config):
        pairwise = parameters["pairwise"]
        if config.pairwise_init == "normal":
            init.normal_(pairwise)
        else:
            init.copy_(pairwise, torch.eye(pairwise.shape[-1]).expand_as(pairwise))

    def fold_query(self, attention, query):
        return query @ attention.pairwise.transpose(1, 2).to(query.dtype)

    def multiply_out(self, parameters, role, rows):
        if role != "key":
            return rows
        heads = rows.unflatten(0, parameters["pairwise"].shape[:2])
        return (parameters["pairwise"].mT @ heads).flatten(0, 1)

    def turn(self, parameters, turn):
        return {"pairwise": turn.mT @ parameters["pairwise"] @ turn}

    def reorder(self, parameters, order):
        return {"pairwise": parameters["pairwise"][order]}
