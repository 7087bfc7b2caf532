"""SharedBERT's config: BERT's fields and those of its attention."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_shared_attention import SharedAttentionConfig


@strict
class SharedBertConfig(SharedAttentionConfig):
    """Config of a BERT encoder whose attention follows an attention scheme; by default BERT-base with ``shared``.

    The fields of attention are described in `SharedAttentionConfig`; the others are `BertConfig`'s.
    """

    model_type = "shared_bert"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "SharedBertModel",
        "AutoModelForMaskedLM": "SharedBertForMaskedLM",
        "AutoModelForSequenceClassification": "SharedBertForSequenceClassification",
        "AutoModelForTokenClassification": "SharedBertForTokenClassification",
        "AutoModelForQuestionAnswering": "SharedBertForQuestionAnswering",
        "AutoModelForMultipleChoice": "SharedBertForMultipleChoice",
    }

    base_model_pp_plan = {
        "embeddings": (["input_ids"], ["inputs_embeds"]),
        "encoder.layer": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "pooler": (["hidden_states"], ["pooler_output"]),
    }
    base_model_fsdp_plan = {"encoder.layer.*": "free_full_weight"}

    attention_scheme: str = "shared"
    vocab_size: int = 30522
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        layer = "encoder.layer.*"
        self.base_model_tp_plan = self._tensor_parallel_plan(
            f"{layer}.attention.self", f"{layer}.intermediate.dense", f"{layer}.output.dense"
        )
