"""The ingredients of schemes: what they have in addition to matrices and roles.

An ingredient defines its parameters: shapes, initialisation, folding, multiplying out, and how they change when a head
is rotated or moved. The parameters themselves are `SelfAttention`'s, under the names given by `shapes`.
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

    def shapes(self, config) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a layer, by its name in `SelfAttention`."""
        return {}

    def init_weights(self, attention: nn.Module):
        """Start the parameters in `attention`; loaded ones are left alone."""

    def fold_query(self, attention: nn.Module, query: torch.Tensor) -> torch.Tensor:
        """Return the query [batch, heads, seq, head_dim] that gives the scheme's logits with the unchanged key."""
        return query

    def fold_context(self, attention: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """Return the context [batch, seq, hidden] of the scheme's value, from that of the unchanged value."""
        return context

    def multiply_out(self, parameters: Parameters, query, key, value) -> tuple[torch.Tensor, ...]:
        """Return the roles as the paper defines them; each is [hidden, n], one row per channel."""
        return query, key, value

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

    def shapes(self, config):
        return dict.fromkeys(("query_diagonal", "key_diagonal", "value_diagonal"), (config.hidden_size,))

    def init_weights(self, attention):
        for name in self.shapes(attention.config):
            init.normal_(getattr(attention, name), mean=1.0, std=attention.config.diagonal_init_std)

    def fold_query(self, attention, query):
        diagonal = (attention.query_diagonal * attention.key_diagonal).to(query.dtype)
        return query * diagonal.view(-1, 1, attention.head_dim)

    def fold_context(self, attention, context):
        return context * attention.value_diagonal.to(context.dtype)

    def multiply_out(self, parameters, query, key, value):
        return tuple(
            parameters[f"{name}_diagonal"][:, None] * role
            for name, role in (("query", query), ("key", key), ("value", value))
        )

    def reorder(self, parameters, order):
        return {name: p.unflatten(0, (len(order), -1))[order].flatten() for name, p in parameters.items()}


class Pairwise(Ingredient):
    """k = q·U, with one U [head_dim, head_dim] per head.

    Since q·(q·U)ᵀ = (q·Uᵀ)·qᵀ, U is applied to the query, and the key is the projection itself.
    """

    words = "a matrix per head stands between query and key"

    def shapes(self, config):
        heads = config.num_attention_heads
        return {"pairwise": (heads, config.hidden_size // heads, config.hidden_size // heads)}

    def init_weights(self, attention):
        if attention.config.pairwise_init == "normal":
            init.normal_(attention.pairwise)
        else:
            init.copy_(attention.pairwise, torch.eye(attention.head_dim).expand_as(attention.pairwise))

    def fold_query(self, attention, query):
        return query @ attention.pairwise.transpose(1, 2).to(query.dtype)

    def multiply_out(self, parameters, query, key, value):
        heads = key.unflatten(0, parameters["pairwise"].shape[:2])
        return query, (parameters["pairwise"].mT @ heads).flatten(0, 1), value

    def turn(self, parameters, turn):
        return {"pairwise": turn.mT @ parameters["pairwise"] @ turn}

    def reorder(self, parameters, order):
        return {"pairwise": parameters["pairwise"][order]}
