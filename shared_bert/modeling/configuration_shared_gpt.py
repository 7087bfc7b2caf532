"""SharedGPT's config: GPT-2's choices under BERT's field names, and those of its attention."""

from typing import ClassVar

from .cache import SHARED_KEY_VALUE
from .configuration_shared_attention import SharedAttentionConfig, checked


@checked
class SharedGptConfig(SharedAttentionConfig):
    """Config of a GPT-2-like decoder (pre-norm, learned positions) whose attention follows an attention scheme.

    The defaults are the query-free GPT-small of Karbevski & Mijoski (arXiv 2510.23912): no biases, no dropout,
    a vocabulary padded to 50304. Stock GPT-2 is ``attention_scheme="standard"`` with all three biases on,
    ``hidden_act="gelu_new"`` and a vocabulary of 50257. The fields of attention are described in
    `SharedAttentionConfig`.

    Args:
        mlp_bias: whether the two matrices of the feed-forward have biases.
        norm_bias: whether the LayerNorms have biases.
    """

    model_type = "shared_gpt"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "SharedGptModel",
        "AutoModelForCausalLM": "SharedGptForCausalLM",
        "AutoModelForSequenceClassification": "SharedGptForSequenceClassification",
        "AutoModelForTokenClassification": "SharedGptForTokenClassification",
    }
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "wpe": (["position_ids"], ["position_embeds"]),
        "drop": (["inputs_embeds"], ["hidden_states"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {"h.*": "free_full_weight"}

    attention_scheme: str = "query_free"
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    vocab_size: int = 50304
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 1024
    attention_probs_dropout_prob: float | int = 0.0
    hidden_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-5
    classifier_dropout: float | int | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    # Whether caches are transformers' paged ones, which know keys and values only. Not saved.
    caches_are_paged = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = self._tensor_parallel_plan("h.*.attn", "h.*.mlp.c_fc", "h.*.mlp.c_proj")

    @property
    def layer_types(self) -> list[str]:
        """The types of cache layers for `generate()`: one stream per layer where key and value are one tensor."""
        is_one_stream = self.scheme.key_is_value and not self.caches_are_paged
        return [SHARED_KEY_VALUE if is_one_stream else "full_attention"] * self.num_hidden_layers

    def validate_layer_type(self):
        """`layer_types` is derived and may name this package's own cache layer: nothing to validate."""

    def _remove_keys_not_serialized(self, d):
        super()._remove_keys_not_serialized(d)
        d.pop("caches_are_paged", None)
