"""Stock BERT and GPT-2 beside this package's models: what corresponds to what, and the way out, `to_stock`."""

import copy

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..modeling import (
    SharedBertConfig,
    SharedBertForMaskedLM,
    SharedBertForMultipleChoice,
    SharedBertForQuestionAnswering,
    SharedBertForSequenceClassification,
    SharedBertForTokenClassification,
    SharedBertModel,
    SharedGptConfig,
    SharedGptForCausalLM,
    SharedGptForSequenceClassification,
    SharedGptForTokenClassification,
    SharedGptModel,
)
from .dense import dense_layers

STOCK_CLASSES = {
    SharedBertModel: BertModel,
    SharedBertForMaskedLM: BertForMaskedLM,
    SharedBertForSequenceClassification: BertForSequenceClassification,
    SharedBertForTokenClassification: BertForTokenClassification,
    SharedBertForQuestionAnswering: BertForQuestionAnswering,
    SharedBertForMultipleChoice: BertForMultipleChoice,
    SharedGptModel: GPT2Model,
    SharedGptForCausalLM: GPT2LMHeadModel,
    SharedGptForSequenceClassification: GPT2ForSequenceClassification,
    SharedGptForTokenClassification: GPT2ForTokenClassification,
}
SHARED_CLASSES = {stock: shared for shared, stock in STOCK_CLASSES.items()}

# Config fields that go over as they are, and GPT-2's under other names.
_COMMON_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "dtype",
)  # fmt: skip
_BERT_FIELDS = (
    "intermediate_size", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size",
    "layer_norm_eps", "classifier_dropout",
)  # fmt: skip
_GPT2_NAMES = {
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
    "use_cache": "use_cache",
}
_STANDARD_BERT = {"attention_scheme": "standard", "attention_bias": True}
_STANDARD_GPT = {**_STANDARD_BERT, "mlp_bias": True, "norm_bias": True}


@torch.no_grad()
def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Multiplies the matrices of a `Shared…` model out into the stock model of the same head.

    Every scheme and every depth sharing can be expressed so: an identity query becomes the identity matrix, a factor
    on the logits part of the query, a missing bias zeros, and grouped keys are repeated. The copy has the model's
    dtype, device and mode, gives the same outputs, and needs nothing of this package. (GPT-2's sequence classifier
    finds the end of a text by `pad_token_id` only, not by the mask.)

    Raises:
        ValueError: the model is none of `STOCK_CLASSES` (a head of one's own, a model wrapped by adapters).
    """
    stock_class = STOCK_CLASSES.get(type(model))
    if stock_class is None:
        raise ValueError(
            f"{type(model).__name__} has no stock counterpart; to_stock takes "
            f"{', '.join(cls.__name__ for cls in STOCK_CLASSES)} (merge adapters first)"
        )
    is_bert = isinstance(model.config, SharedBertConfig)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in (".self.", "attn.", "depth_sharing."))
    }
    if is_bert:
        if "cls.predictions.decoder.bias" in state:
            state["cls.predictions.bias"] = state["cls.predictions.decoder.bias"]
        _write_bert_attention(model, state)
    else:
        for name in [name for name in state if "mlp.c_" in name and name.endswith("weight")]:
            state[name] = state[name].T
        _write_gpt2_attention(model, state)
    config = _stock_config(model.config)
    if stock_class is BertForQuestionAnswering:
        config.num_labels = 2  # a start and an end, whatever the labels of the checkpoint were
    stock = build_like(stock_class, config, model)
    if not is_bert:
        # GPT-2 has biases everywhere.
        zeros = {n: torch.zeros_like(p) for n, p in stock.named_parameters() if n.endswith("bias") and n not in state}
        state |= zeros
    stock.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


@torch.no_grad()
def read_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the ``standard`` model of this package with the weights, and so the outputs, of a stock model.

    Raises:
        ValueError: naming an architecture, a head or an option of GPT-2 that has no counterpart.
    """
    config = standard_config(model)
    shared = build_like(SHARED_CLASSES[type(model)], config, model)
    shared.load_state_dict(model.state_dict())
    if getattr(model, "generation_config", None) is not None:
        shared.generation_config = copy.deepcopy(model.generation_config)
    return shared


def build_like(cls: type, config: PreTrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    """Makes a model of `config` in the dtype, on the device and in the mode of another."""
    has_no_pooler = hasattr(like, "pooler") and like.pooler is None
    model = cls(config, **({"add_pooling_layer": False} if has_no_pooler else {}))
    model.set_attn_implementation(like.config._attn_implementation)
    return model.to(like.device, like.dtype).train(like.training)


def _stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    fields = {name: getattr(config, name) for name in _COMMON_FIELDS}
    if isinstance(config, SharedBertConfig):
        return BertConfig(**fields, **{name: getattr(config, name) for name in _BERT_FIELDS})
    renamed = {stock: getattr(config, ours) for ours, stock in _GPT2_NAMES.items()}
    dropout = {"embd_pdrop": config.hidden_dropout_prob, "classifier_dropout": config.classifier_dropout}
    return GPT2Config(**fields, **renamed, **dropout)


def standard_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Makes the config that `read_stock` gives a stock model, and raises its errors."""
    if type(model) not in SHARED_CLASSES:
        raise ValueError(
            f"{type(model).__name__} cannot be converted; from_stock takes "
            f"{', '.join(cls.__name__ for cls in SHARED_CLASSES)} and the models of this package"
        )
    config = model.config
    for option in ("is_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if getattr(config, option, False):
            raise ValueError(f"{type(model).__name__} with {option}=True cannot be converted: turn the option off")
    fields = {name: getattr(config, name) for name in _COMMON_FIELDS}
    if isinstance(config, BertConfig):
        return SharedBertConfig(**fields, **{name: getattr(config, name) for name in _BERT_FIELDS}, **_STANDARD_BERT)
    renamed = {ours: getattr(config, stock) for ours, stock in _GPT2_NAMES.items()}
    renamed["intermediate_size"] = config.n_inner or 4 * config.n_embd
    return SharedGptConfig(
        **fields,
        **renamed,
        classifier_dropout=getattr(config, "classifier_dropout", None),
        attention_scale=None if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5,
        **_STANDARD_GPT,
    )


def _write_bert_attention(model: PreTrainedModel, state: dict[str, torch.Tensor]):
    prefix = "" if isinstance(model, SharedBertModel) else "bert."
    for i, layer in enumerate(dense_layers(model)):
        at = f"{prefix}encoder.layer.{i}.attention"
        for name, affine in (
            (f"{at}.self.query", layer.query),
            (f"{at}.self.key", layer.key),
            (f"{at}.self.value", layer.value),
            (f"{at}.output.dense", layer.output),
        ):
            state[f"{name}.weight"], state[f"{name}.bias"] = affine.weight, affine.bias


def _write_gpt2_attention(model: PreTrainedModel, state: dict[str, torch.Tensor]):
    prefix = "" if isinstance(model, SharedGptModel) else "transformer."
    for i, layer in enumerate(dense_layers(model)):
        at = f"{prefix}h.{i}.attn"
        roles = (layer.query, layer.key, layer.value)
        # GPT-2's matrices are [in, out].
        state[f"{at}.c_attn.weight"] = torch.cat([role.weight for role in roles]).T
        state[f"{at}.c_attn.bias"] = torch.cat([role.bias for role in roles])
        state[f"{at}.c_proj.weight"], state[f"{at}.c_proj.bias"] = layer.output.weight.T, layer.output.bias
