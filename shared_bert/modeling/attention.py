"""Self-attention of every scheme, folded: the trained parameters are the papers', the computation is not.

- All distinct matrices are one `projection`; the roles are views of its result.
- A scheme's ingredient (see `ingredients`) is applied to the query and to the context, so that keys and values stay
  views of the projection, and are cached as such.
- Roles with the same matrix are the same tensor, never a copy.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .piecewise_attention import Texts, is_for_pieces, mask_of_texts, piecewise_attention_forward
from .projections import make_linear


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out.

    Args:
        query: [batch, heads, queries, head_dim]; `key` and `value`: [batch, key_value_heads, keys, head_dim].
        attention_mask: added to the logits, or None.

    Returns:
        The context [batch, queries, heads, head_dim] and the weights [batch, heads, queries, keys].
    """
    if module.num_key_value_groups > 1:
        key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.softmax(logits, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class SelfAttention(nn.Module):
    """Multi-head self-attention whose query, key and value come from the matrices of `config.attention_scheme`.

    Owns the matrices, the roles, the output matrix and the use of the cache; norms, residuals and the dropout of
    the result are the block's.

    Args:
        config: a `SharedAttentionConfig`.
        layer_idx: the layer's index in the cache.
        is_causal: whether a token may not attend to later ones.
    """

    def __init__(self, config, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.scheme = config.scheme
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        scale = self.scheme.scale if config.attention_scale is None else config.attention_scale
        self.scaling = scale * self.head_dim**-0.5

        self.widths = list(config.matrix_widths("projection").values())
        self.projection = make_linear(config, layer_idx, "projection")
        self.output = make_linear(config, layer_idx, "output")
        for name, shape in self.scheme.ingredient.shapes(config.num_attention_heads, self.head_dim).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @property
    def ingredient_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are not in a Linear, by name."""
        names = self.scheme.ingredient.shapes(self.config.num_attention_heads, self.head_dim)
        return {name: getattr(self, name) for name in names}

    def init_weights(self):
        """Start the parameters that are not in a Linear; loaded ones are left alone."""
        self.scheme.ingredient.init_weights(self.ingredient_parameters, self.config)

    def roles(
        self, hidden_states: torch.Tensor, projection_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query, key and value, each [batch, heads, seq, head_dim], of [batch, seq, hidden]."""
        projected = _apply(self.projection, hidden_states, projection_weight)
        tensors = dict(zip(self.scheme.matrices, projected.split(self.widths, dim=-1), strict=True))
        # Under autocast a LayerNorm's result is float32 and a projection's is not; attention needs one dtype.
        tensors["x"] = hidden_states.to(projected.dtype)
        heads = {name: tensor.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for name, tensor in tensors.items()}
        query, key, value = (heads[role] for role in self.scheme.roles)
        return self.scheme.ingredient.fold_query(self, query), key, value

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        projection_weight: torch.Tensor | None = None,
        output_weight: torch.Tensor | None = None,
        past_key_values=None,
        texts: Texts | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend to `hidden_states` [batch, seq, hidden] and to the cached tokens.

        Args:
            projection_weight, output_weight: the matrices that the layers share (see `DepthSharing`).
            texts: see `piecewise_attention_forward`.

        Returns:
            The result [batch, seq, hidden] and, from the eager implementation, the attention weights.
        """
        query, key, value = self.roles(hidden_states, projection_weight)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if (
            implementation == "sdpa"
            and (texts is not None or 0 < dropout < 1)
            and is_for_pieces(query, attention_mask)
        ):
            attend, kwargs["texts"] = piecewise_attention_forward, texts
        elif texts is not None:
            attention_mask = mask_of_texts(texts, query, self.is_causal)
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        context = context.reshape(*hidden_states.shape[:-1], -1)  # vLLM's attention returns [tokens, hidden]
        context = self.scheme.ingredient.fold_context(self, context)
        return _apply(self.output, context, output_weight), weights


def _apply(linear: nn.Module, inputs: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return linear(inputs) if weight is None else linear(inputs, weight)
