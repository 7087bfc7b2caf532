"""SharedGPT: a GPT-2-like decoder (pre-norm, learned positions, optional biases) whose attention follows a scheme.

Parameter names outside attention are stock GPT-2's, and matrices are `nn.Linear` ([out, in]). With ``standard``
and all biases on, `load_state_dict` accepts a stock state dict (with matrices [in, out]), and the logits are equal.
"""

import math
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import SelfAttention
from .configuration_shared_gpt import SharedGptConfig
from .depth_sharing import SharedMatrix, make_depth_sharing, shared_weights
from .documents import attention_inputs, check_length, check_positions, document_positions
from .dropout import Dropout
from .loading import SafetensorsOnly
from .losses import linear_cross_entropy
from .projections import LowRankLinear, SharedLinear
from .stock_names import StockName, read_stock_names

logger = logging.get_logger(__name__)


class SharedGptMLP(nn.Module):
    def __init__(self, config: SharedGptConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        # "gelu_new" is the same function, in eight operations where this is one.
        self.act = ACT2FN["gelu_pytorch_tanh" if config.hidden_act == "gelu_new" else config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(hidden_states)))


class SharedGptBlock(GradientCheckpointingLayer):
    stock_names = (
        StockName("attn.projection", ("attn.c_attn",), is_transposed=True),
        StockName("attn.output", ("attn.c_proj",), is_transposed=True),
        StockName("mlp.c_fc", ("mlp.c_fc",), is_transposed=True),
        StockName("mlp.c_proj", ("mlp.c_proj",), is_transposed=True),
    )

    def __init__(self, config: SharedGptConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = _layer_norm(config)
        self.attn = SelfAttention(config, layer_idx, is_causal=True)
        self.ln_2 = _layer_norm(config)
        self.mlp = SharedGptMLP(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.attn.output.adds_to_residual = self.mlp.c_proj.adds_to_residual = True
        if config.is_stock:
            self.register_load_state_dict_pre_hook(read_stock_names)

    # Shared weights are positional: checkpointing passes gradients to positional arguments only.
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask=None,
        *shared_weights: torch.Tensor,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.attn(
            self.ln_1(hidden_states), attention_mask, *shared_weights, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.ln_2(hidden_states)))


def _layer_norm(config: SharedGptConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


class SharedGptPreTrainedModel(SafetensorsOnly, PreTrainedModel):
    config: SharedGptConfig
    config_class = SharedGptConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SharedGptBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": SharedGptBlock, "attentions": SelfAttention}

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SelfAttention):
            module.init_weights()
        std = self.config.initializer_range
        if getattr(module, "adds_to_residual", False):
            # Every block adds to the residual stream twice; GPT-2 starts these matrices accordingly smaller.
            std /= math.sqrt(2 * self.config.num_hidden_layers)
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=std)
        if isinstance(module, LowRankLinear | SharedLinear | SharedMatrix):
            module.init_weights(std)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """Return one mask for all layers in compiled generation; the default would make one per layer type."""
        return create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids)


class SharedGptModel(SharedGptPreTrainedModel):
    """The decoder, without a head."""

    def __init__(self, config: SharedGptConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = Dropout(config.hidden_dropout_prob)
        self.h = nn.ModuleList([SharedGptBlock(config, i) for i in range(config.num_hidden_layers)])
        self.depth_sharing = make_depth_sharing(config)
        if "output" in config.shared_maps and self.depth_sharing is not None:
            self.depth_sharing["o"].adds_to_residual = True
        self.ln_f = _layer_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding):
        self.wte = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Read `input_ids` [batch, seq] or `inputs_embeds` [batch, seq, hidden], after the cached tokens.

        Args:
            attention_mask: [batch, cached + seq], 0 where a token is padding, on either side.
            position_ids: [batch, seq]; by default 0, 1, 2 … after the cached tokens. `generate()` passes those
                of left-padded rows.
            document_ids: [batch, seq] of a packed batch, in place of `attention_mask`: tokens attend within
                their document only, and positions restart in each (see `documents`).

        Returns:
            `last_hidden_state` [batch, seq, hidden], and `past_key_values` where `use_cache`.

        Raises:
            ValueError: not exactly one input, or positions beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None and document_ids is not None:
            position_ids = document_positions(document_ids)
        if position_ids is not None:
            check_positions(self.config, position_ids)
        elif isinstance(past_length, int):  # a static cache's is a tensor
            check_length(self.config, past_length + inputs_embeds.shape[1])
        mask, packing = attention_inputs(
            self.config, True, inputs_embeds, attention_mask, document_ids, position_ids, past_key_values
        )
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        # After the mask, which separates documents by their positions if there is no cache.
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        # In a later stage of a pipeline the input is hidden states, with positions added.
        is_first_stage = not isinstance(self.wpe, nn.Identity)
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids) if is_first_stage else inputs_embeds)
        weights = shared_weights(self.depth_sharing, len(self.h), past_key_values)
        for block, block_weights in zip(self.h, weights, strict=True):
            hidden_states = block(
                hidden_states, mask, *block_weights, past_key_values=past_key_values, **packing, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )


def _within_positions(manager, config: SharedGptConfig):
    """Return `add_request` of a manager of continuous batching, for texts that end at the last position."""
    add_request, settings = manager.add_request, manager.generation_config

    def add(input_ids, request_id=None, max_new_tokens=None, *args, **kwargs):
        check_length(config, len(input_ids))
        wanted = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        room = config.max_position_embeddings + 1 - len(input_ids)  # the last token needs no position
        return add_request(input_ids, request_id, room if wanted is None else min(wanted, room), *args, **kwargs)

    return add


class SharedGptForCausalLM(SharedGptPreTrainedModel, GenerationMixin):
    """The decoder with a head over the vocabulary, tied to the word embeddings.

    `generate` ends, with a warning, where no position is left: a padded batch, where its longest row has none.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: SharedGptConfig):
        super().__init__(config)
        self.transformer = SharedGptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Predict each next token; arguments not named here are `SharedGptModel.forward`'s.

        Args:
            labels: [batch, seq], the tokens themselves (they are shifted here); -100 where nothing is predicted.
                Training that splits sequences over devices passes `shift_labels`, which replace them: the next token
                of every position, since a part does not contain the token that follows it.
            logits_to_keep: return logits for this many last positions, or for these positions; 0 returns all.
            skip_logits: return no `logits`. None means True when training with labels.

        Returns:
            `loss`, the mean over predicted positions in nats, and `logits` [batch, kept, vocabulary].
        """
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = loss = None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        if labels is not None:
            has_all = not skip_logits and isinstance(logits_to_keep, int) and logits_to_keep == 0
            rows, head = (logits, None) if has_all else (hidden_states, self.lm_head)
            # Not a named argument: Trainer would then compute an evaluation loss only if it is given.
            targets = kwargs.get("shift_labels")
            if targets is None:
                rows, targets = rows[:, :-1], labels[:, 1:]
            loss = linear_cross_entropy(rows.flatten(0, 1), head, targets.flatten(), kwargs.get("num_items_in_batch"))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, *args, model_kwargs=None, **kwargs):
        # `generate` calls this once, when it knows the positions of the prompt and has not used `max_length` yet.
        if model_kwargs is not None:  # continuous batching has none; see `_within_positions`
            room = self.config.max_position_embeddings - int(model_kwargs["position_ids"].max())  # the last needs none
            if generation_config.max_length > input_ids_seq_length + room:
                logger.warning_once("generation ends at the model's last position (max_position_embeddings)")
                generation_config.max_length = input_ids_seq_length + room
        return super()._get_logits_processor(
            generation_config, input_ids_seq_length, *args, model_kwargs=model_kwargs, **kwargs
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Return the manager of transformers, whose paged cache keeps a key and a value of every token.

        Schemes whose key is their value take twice the bytes there that `generate` does, and so they do in `generate`
        once a manager has been made, unless by `generate_batch` or `continuous_batching_context_manager`. Texts end
        where no position is left; adding a longer prompt raises a ValueError.
        """
        self.config.caches_are_paged = True
        manager = super().init_continuous_batching(*args, **kwargs)
        if "add_request" not in vars(manager):  # else it is one that is used again
            manager.add_request = _within_positions(manager, self.config)
        return manager

    def generate_batch(self, inputs, *args, **kwargs):
        """Generate by continuous batching, as transformers does; a prompt that is too long raises a ValueError."""
        for prompt in inputs:
            check_length(self.config, len(prompt))
        return super().generate_batch(inputs, *args, **kwargs)

    @contextmanager
    def continuous_batching_context_manager(self, *args, **kwargs):
        """See transformers' method, which `generate_batch` uses, too."""
        before = self.config.caches_are_paged
        try:
            with super().continuous_batching_context_manager(*args, **kwargs) as manager:
                yield manager
        finally:
            self.config.caches_are_paged = before  # True while another manager is there


class SharedGptForSequenceClassification(SharedGptPreTrainedModel):
    """Classifies (or, with one label, scores) a text by its last token that is not padding."""

    accepts_loss_kwargs = False  # the loss is the mean of one batch; Trainer averages accumulated ones

    def __init__(self, config: SharedGptConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = SharedGptModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """Return `logits` [batch, labels]; `labels` [batch] are classes, or numbers where `num_labels` is 1.

        The last token is found by `attention_mask`, else by `pad_token_id`.

        Raises:
            ValueError: a batch of several rows with neither.
        """
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        logits = self.score(
            hidden_states[
                torch.arange(len(hidden_states)), self._last(input_ids, attention_mask, hidden_states.shape[1])
            ]
        )
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last(self, input_ids, attention_mask, length: int) -> torch.Tensor | int:
        if attention_mask is not None and attention_mask.ndim == 2:
            is_text = attention_mask[:, -length:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_text = input_ids != self.config.pad_token_id
        elif input_ids is None or len(input_ids) == 1:
            return -1
        else:
            raise ValueError(
                "a batch of several texts needs an attention_mask, or pad_token_id in the config, to find their ends"
            )
        return (is_text * torch.arange(is_text.shape[1], device=is_text.device)).argmax(dim=1)


class SharedGptForTokenClassification(SharedGptPreTrainedModel):
    """Classifies every token, from what comes before it."""

    accepts_loss_kwargs = False  # as of `SharedGptForSequenceClassification`

    def __init__(self, config: SharedGptConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = SharedGptModel(config)
        # GPT-2's own head drops out 10 % where the config does not say.
        self.dropout = nn.Dropout(0.1 if config.classifier_dropout is None else config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        """Return `logits` [batch, seq, labels]; `labels` [batch, seq], -100 where a token has none."""
        outputs = self.transformer(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
