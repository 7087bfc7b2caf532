"""The families of models and their stock counterparts, one record each.

A new family is a model file in `modeling` and a record here.
"""

from dataclasses import dataclass, field

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import modeling
from ..modeling import SharedAttentionConfig

AUTO_CLASSES = {"mlm": transformers.AutoModelForMaskedLM, "clm": transformers.AutoModelForCausalLM}
# Config fields of the same name in ours and in stock, in every family.
_COMMON_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "dtype", "classifier_dropout",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What corresponds to what in the models of this package ("ours") and in stock ones.

    Args:
        description: for a model card.
        config, stock_config: the config classes.
        tokenizer: the stock tokenizer.
        classes: the stock class of each of ours, one pair per head.
        objective: what the language model predicts: "mlm" (masked tokens) or "clm" (the next token).
        language_model: the class of ours with a head over the vocabulary.
        vocabulary_head: the path of that head in the language model.
        final_norm: the path, in the base model, of the norm after the last layer only; None if there is none.
        fields: stock names of config fields, by ours; the first of several is read and all are written.
        standard: fields of ours that make a ``standard`` config stock.
        other_names: stock names of tensors outside the layers, by ours.
    """

    description: str
    config: type[SharedAttentionConfig]
    stock_config: type[PreTrainedConfig]
    tokenizer: type[PreTrainedTokenizerBase]
    classes: dict[type[PreTrainedModel], type[PreTrainedModel]]
    objective: str
    language_model: type[PreTrainedModel]
    vocabulary_head: str
    final_norm: str | None
    fields: dict[str, tuple[str, ...]]
    standard: dict[str, object]
    other_names: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def to_stock_config(self, config: SharedAttentionConfig) -> PreTrainedConfig:
        """Return the stock config of the same shape."""
        stock = {name: getattr(config, name) for name in _COMMON_FIELDS}
        stock |= {name: getattr(config, ours) for ours, names in self.fields.items() for name in names}
        return self.stock_config(**stock)

    def from_stock_config(self, config: PreTrainedConfig) -> SharedAttentionConfig:
        """Return the ``standard`` config of a stock one."""
        shared = {name: getattr(config, name, None) for name in _COMMON_FIELDS}
        shared |= {ours: getattr(config, names[0]) for ours, names in self.fields.items()}
        if shared["intermediate_size"] is None:  # GPT-2's default
            shared["intermediate_size"] = 4 * config.hidden_size
        if not getattr(config, "scale_attn_weights", True):
            shared["attention_scale"] = (config.hidden_size // config.num_attention_heads) ** 0.5
        return self.config(**shared, attention_scheme="standard", attention_bias=True, **self.standard)

    def is_language_model(self, model: PreTrainedModel) -> bool:
        return isinstance(model, self.language_model)

    def predict(self, model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the logits of a language model's head for [..., hidden] of the last layer."""
        return model.get_submodule(self.vocabulary_head)(hidden_states)

    def normed(self, model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return [..., hidden] of an inner layer, normed as the head's inputs are."""
        if self.final_norm is None:
            return hidden_states
        return model.base_model.get_submodule(self.final_norm)(hidden_states)


FAMILIES: dict[str, Family] = {}  # by the model type of ours
STOCK_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}  # by the class of ours
SHARED_CLASSES: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}  # by the stock class


def register(family: Family):
    """Add a family to this package's tables and to the Auto classes of transformers."""
    config = family.config
    FAMILIES[config.model_type] = family
    STOCK_CLASSES.update(family.classes)
    SHARED_CLASSES.update({stock: shared for shared, stock in family.classes.items()})

    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoTokenizer.register(config, tokenizer_class=family.tokenizer, exist_ok=True)
    config.register_for_auto_class()
    by_name = {cls.__name__: cls for cls in family.classes}
    for auto_name, name in config.auto_classes.items():
        auto = getattr(transformers, auto_name)
        auto.register(config, by_name[name], exist_ok=True)
        # An internal name: Trainer looks up here by name which labels to shift, and `register` fills another table.
        auto._model_mapping._model_mapping.setdefault(config.model_type, name)
        by_name[name].register_for_auto_class(auto_name)


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a config, ours or stock.

    Raises:
        ValueError: it belongs to no family.
    """
    for family in FAMILIES.values():
        if config.model_type in (family.config.model_type, family.stock_config.model_type):
            return family
    raise ValueError(f"{type(config).__name__} belongs to none of the families {', '.join(FAMILIES)}")


_SAME = ("intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")

register(
    Family(
        description="BERT encoder",
        config=modeling.SharedBertConfig,
        stock_config=transformers.BertConfig,
        tokenizer=transformers.BertTokenizer,
        classes={
            modeling.SharedBertModel: transformers.BertModel,
            modeling.SharedBertForMaskedLM: transformers.BertForMaskedLM,
            modeling.SharedBertForSequenceClassification: transformers.BertForSequenceClassification,
            modeling.SharedBertForTokenClassification: transformers.BertForTokenClassification,
            modeling.SharedBertForQuestionAnswering: transformers.BertForQuestionAnswering,
            modeling.SharedBertForMultipleChoice: transformers.BertForMultipleChoice,
        },
        objective="mlm",
        language_model=modeling.SharedBertForMaskedLM,
        vocabulary_head="cls.predictions",
        final_norm=None,
        fields={name: (name,) for name in (*_SAME, "type_vocab_size")},
        standard={},
        other_names={"cls.predictions.decoder.bias": ("cls.predictions.decoder.bias", "cls.predictions.bias")},
    )
)
register(
    Family(
        description="GPT-2-like decoder",
        config=modeling.SharedGptConfig,
        stock_config=transformers.GPT2Config,
        tokenizer=transformers.GPT2Tokenizer,
        classes={
            modeling.SharedGptModel: transformers.GPT2Model,
            modeling.SharedGptForCausalLM: transformers.GPT2LMHeadModel,
            modeling.SharedGptForSequenceClassification: transformers.GPT2ForSequenceClassification,
            modeling.SharedGptForTokenClassification: transformers.GPT2ForTokenClassification,
        },
        objective="clm",
        language_model=modeling.SharedGptForCausalLM,
        vocabulary_head="lm_head",
        final_norm="ln_f",
        fields={
            "intermediate_size": ("n_inner",),
            "hidden_act": ("activation_function",),
            "hidden_dropout_prob": ("resid_pdrop", "embd_pdrop"),
            "attention_probs_dropout_prob": ("attn_pdrop",),
            "layer_norm_eps": ("layer_norm_epsilon",),
            "use_cache": ("use_cache",),
            # Converters of other libraries still read the older name.
            "max_position_embeddings": ("n_positions", "n_ctx"),
        },
        standard={"mlp_bias": True, "norm_bias": True},
    )
)
