"""SharedBERT: BERT (post-norm encoder) whose attention follows a scheme.

Everything around attention is stock BERT's own module under its own name, so with ``standard`` this model is
BERT: `load_state_dict` accepts a stock state dict (names inside attention are translated), and the logits are equal.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPooler,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import SelfAttention
from .configuration_shared_bert import SharedBertConfig
from .depth_sharing import SharedMatrix, make_depth_sharing, shared_weights
from .documents import attention_inputs, check_length, check_positions, document_positions
from .dropout import Dropout
from .loading import SafetensorsOnly
from .losses import linear_cross_entropy, predicted_positions
from .projections import LowRankLinear, SharedLinear
from .stock_names import StockName, read_stock_names


class SharedBertAttentionNorm(nn.Module):
    """Dropout, residual and LayerNorm after attention; the name of the norm is stock BERT's."""

    def __init__(self, config: SharedBertConfig):
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(hidden_states) + residual)


class SharedBertAttention(nn.Module):
    stock_names = (
        StockName("self.projection", ("self.query", "self.key", "self.value")),
        StockName("self.output", ("output.dense",)),
    )

    def __init__(self, config: SharedBertConfig, layer_idx: int):
        super().__init__()
        self.self = SelfAttention(config, layer_idx, is_causal=False)
        self.output = SharedBertAttentionNorm(config)
        if config.is_stock:
            self.register_load_state_dict_pre_hook(read_stock_names)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        attended, _ = self.self(hidden_states, *args, **kwargs)
        return self.output(attended, hidden_states)


class SharedBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: SharedBertConfig, layer_idx: int):
        super().__init__()
        self.attention = SharedBertAttention(config, layer_idx)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.output.dropout = Dropout(config.hidden_dropout_prob)

    # Shared weights are positional: checkpointing passes gradients to positional arguments only.
    def forward(
        self, hidden_states: torch.Tensor, attention_mask=None, *shared_weights: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        attended = self.attention(hidden_states, attention_mask, *shared_weights, **kwargs)
        return self.output(self.intermediate(attended), attended)


class SharedBertEncoder(nn.Module):
    def __init__(self, config: SharedBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([SharedBertLayer(config, i) for i in range(config.num_hidden_layers)])
        self.depth_sharing = make_depth_sharing(config)

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, **kwargs) -> BaseModelOutput:
        weights = shared_weights(self.depth_sharing, len(self.layer))
        for layer, layer_weights in zip(self.layer, weights, strict=True):
            hidden_states = layer(hidden_states, attention_mask, *layer_weights, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class SharedBertPreTrainedModel(SafetensorsOnly, BertPreTrainedModel):
    config: SharedBertConfig
    config_class = SharedBertConfig
    base_model_prefix = "bert"
    # Not the embeddings: FSDP2 would shard them, and their tied matrix once more with the head.
    _no_split_modules = ["SharedBertLayer"]
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SharedBertLayer, "attentions": SelfAttention}

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks for the attention interface in this file only, where the classes named attention lack it.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SelfAttention):
            module.init_weights()
        if isinstance(module, LowRankLinear | SharedLinear | SharedMatrix):
            module.init_weights(self.config.initializer_range)


class SharedBertModel(SharedBertPreTrainedModel):
    """The encoder, with a pooler over the first token unless `add_pooling_layer` is False."""

    def __init__(self, config: SharedBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.embeddings.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder = SharedBertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode `input_ids` [batch, seq] or `inputs_embeds` [batch, seq, hidden].

        Args:
            attention_mask: [batch, seq], 0 where a token is padding.
            document_ids: [batch, seq] of a packed batch, in place of `attention_mask`: tokens attend within
                their document only, and positions restart in each (see `documents`).

        Returns:
            `last_hidden_state` [batch, seq, hidden], `pooler_output` [batch, hidden].

        Raises:
            ValueError: not exactly one input, or positions beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if position_ids is None and document_ids is not None:
            position_ids = document_positions(document_ids)
        if position_ids is None:
            check_length(self.config, (input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        else:
            check_positions(self.config, position_ids)
        # In a later stage of a pipeline this module returns its first argument, hidden states.
        embeddings = self.embeddings(
            inputs_embeds=inputs_embeds, input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
        )
        attention_mask, packing = attention_inputs(
            self.config, False, embeddings, attention_mask, document_ids, position_ids
        )
        encoded = self.encoder(embeddings, attention_mask, **packing, **kwargs).last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded, pooler_output=None if self.pooler is None else self.pooler(encoded)
        )


class SharedBertPredictionHead(nn.Module):
    """BERT's head over the vocabulary, with the bias of its decoder under one name.

    Stock BERT also has it as `bias`, which FSDP2 cannot shard.
    """

    def __init__(self, config: SharedBertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.register_load_state_dict_pre_hook(_drop_second_name)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.transform(hidden_states))


def _drop_second_name(module, state_dict, prefix, *args):
    if f"{prefix}bias" in state_dict:
        # In a head that is not tied they are different parameters, and stock adds the decoder's.
        state_dict.setdefault(f"{prefix}decoder.bias", state_dict[f"{prefix}bias"])
        del state_dict[f"{prefix}bias"]


class SharedBertForMaskedLM(SharedBertPreTrainedModel):
    """The encoder with BERT's head over the vocabulary, tied to the word embeddings."""

    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}

    def __init__(self, config: SharedBertConfig):
        super().__init__(config)
        self.bert = SharedBertModel(config, add_pooling_layer=False)
        self.cls = nn.ModuleDict({"predictions": SharedBertPredictionHead(config)})
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.cls.predictions.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_predictions: int | None = None,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        """Predict masked tokens; arguments not named here are `SharedBertModel.forward`'s.

        Args:
            labels: [batch, seq]; -100 where nothing is predicted.
            num_predictions: an upper bound of the labels that are not -100, which keeps shapes static (see
                `losses.predicted_positions`).
            skip_logits: return no `logits`, and run the head at predicted positions only. None means True when
                training with labels.

        Returns:
            `loss`, the mean over predicted positions in nats, and `logits` [batch, seq, vocabulary].
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = None if skip_logits else self.cls.predictions(hidden_states)
        loss = None
        if labels is not None:
            rows = (hidden_states if skip_logits else logits).flatten(0, 1)
            targets = labels.flatten()
            positions = predicted_positions(labels, num_predictions)
            if positions is not None:
                rows, targets = rows[positions], targets[positions]
            head = None
            if skip_logits:
                rows, head = self.cls.predictions.transform(rows), self.cls.predictions.decoder
            loss = linear_cross_entropy(rows, head, targets, kwargs.get("num_items_in_batch"))
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SharedBertClassifier(SharedBertPreTrainedModel):
    """Base class of classification heads: the encoder, dropout and one linear layer."""

    accepts_loss_kwargs = False  # the loss is the mean of one batch; Trainer averages accumulated ones

    def __init__(self, config: SharedBertConfig, num_outputs: int, add_pooling_layer: bool):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = SharedBertModel(config, add_pooling_layer=add_pooling_layer)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        self.post_init()


class SharedBertForSequenceClassification(SharedBertClassifier):
    """Classifies (or, with one label, scores) a text or a pair of texts by the pooled first token."""

    def __init__(self, config: SharedBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        """Return `logits` [batch, labels]; `labels` [batch] are classes, or numbers where `num_labels` is 1."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SharedBertForTokenClassification(SharedBertClassifier):
    """Classifies every token."""

    def __init__(self, config: SharedBertConfig):
        super().__init__(config, config.num_labels, add_pooling_layer=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Return `logits` [batch, seq, labels]; `labels` [batch, seq], -100 where a token has none."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SharedBertForMultipleChoice(SharedBertClassifier):
    """Scores several continuations of a text and picks one."""

    def __init__(self, config: SharedBertConfig):
        super().__init__(config, 1, add_pooling_layer=True)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:
        """Return `logits` [batch, choices] of inputs [batch, choices, seq]; `labels` are [batch]."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        num_choices = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        outputs = self.bert(*(None if t is None else t.flatten(0, 1) for t in inputs), **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output)).view(-1, num_choices)
        return MultipleChoiceModelOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SharedBertForQuestionAnswering(SharedBertPreTrainedModel):
    """Marks the start and the end of an answer in a text."""

    accepts_loss_kwargs = False  # as of `SharedBertClassifier`

    def __init__(self, config: SharedBertConfig):
        super().__init__(config)
        self.bert = SharedBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:
        """Return `start_logits` and `end_logits` [batch, seq]; the positions [batch] are the labels.

        A position beyond the sequence (an answer that was cut off) is ignored by the loss.
        """
        outputs = self.bert(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
