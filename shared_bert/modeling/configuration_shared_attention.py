"""The config fields that say how attention makes its query, key and value; the same in every model."""

import math

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .schemes import SCHEMES, Scheme


@strict
class SharedAttentionConfig(PreTrainedConfig):
    """Fields of `SelfAttention`, checked when a config is made.

    Args:
        attention_scheme: a key of `schemes.SCHEMES`.
        attention_scale: factor on the usual 1/sqrt(head_dim) of the logits; None takes the scheme's own
            (½ for ``query_free``, else 1).
        attention_bias: whether the projections and the output matrix have biases. Diagonals and pairwise
            matrices never have one.
        num_key_value_heads: fewer heads for key and value (grouped queries); None means as many as queries.
        diagonal_init_std: the diagonals of ``shared`` start at N(1, std²); 0 starts them at one, where the
            scheme is ``unified``.
        pairwise_init: "normal" starts each U of ``pairwise`` at N(0, 1), as its authors do; "identity" starts
            it as ``symmetric``.

    Raises:
        ValueError: naming the field, for a value or a combination that has no meaning.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    attention_scheme: str = "standard"
    attention_scale: float | int | None = None
    attention_bias: bool = True
    num_key_value_heads: int | None = None
    diagonal_init_std: float | int = 0.0
    pairwise_init: str = "normal"
    attention_probs_dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    initializer_range: float | int = 0.02

    @property
    def scheme(self) -> Scheme:
        if self.attention_scheme not in SCHEMES:
            raise ValueError(
                f"attention_scheme={self.attention_scheme!r} is unknown; choose one of {', '.join(SCHEMES)}"
            )
        return SCHEMES[self.attention_scheme]

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_attention()
        super().__post_init__(**kwargs)

    def _check_attention(self):
        scheme = self.scheme
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for field in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1")
        for field in ("diagonal_init_std", "initializer_range"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)} must be a finite number, 0 or more")
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale={self.attention_scale} must be a finite number above 0, or None")
        if self.pairwise_init not in ("normal", "identity"):
            raise ValueError(f"pairwise_init={self.pairwise_init!r} must be 'normal' or 'identity'")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads != self.num_attention_heads and not scheme.can_group:
            groupable = ", ".join(name for name, row in SCHEMES.items() if row.can_group)
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} groups queries, but attention_scheme="
                f"{self.attention_scheme!r} takes its key or value from the query's matrix or from the input, "
                f"which have num_attention_heads={self.num_attention_heads} heads; it can be had with {groupable}"
            )
