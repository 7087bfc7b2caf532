"""Configs, attention and models: the code that goes to the Hub with a checkpoint."""

from .attention import SelfAttention
from .configuration_shared_attention import SharedAttentionConfig
from .configuration_shared_bert import SharedBertConfig
from .configuration_shared_gpt import SharedGptConfig
from .depth_sharing import fix_coefficients
from .modeling_shared_bert import (
    SharedBertForMaskedLM,
    SharedBertForMultipleChoice,
    SharedBertForQuestionAnswering,
    SharedBertForSequenceClassification,
    SharedBertForTokenClassification,
    SharedBertModel,
    SharedBertPreTrainedModel,
)
from .modeling_shared_gpt import (
    SharedGptForCausalLM,
    SharedGptForSequenceClassification,
    SharedGptForTokenClassification,
    SharedGptModel,
    SharedGptPreTrainedModel,
)
from .schemes import SCHEMES, Scheme

__all__ = [
    "SCHEMES",
    "Scheme",
    "SelfAttention",
    "SharedAttentionConfig",
    "SharedBertConfig",
    "SharedBertForMaskedLM",
    "SharedBertForMultipleChoice",
    "SharedBertForQuestionAnswering",
    "SharedBertForSequenceClassification",
    "SharedBertForTokenClassification",
    "SharedBertModel",
    "SharedBertPreTrainedModel",
    "SharedGptConfig",
    "SharedGptForCausalLM",
    "SharedGptForSequenceClassification",
    "SharedGptForTokenClassification",
    "SharedGptModel",
    "SharedGptPreTrainedModel",
    "fix_coefficients",
]
