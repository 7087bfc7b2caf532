"""Classifiers for vLLM, whose own class for transformers models has no pooler between encoder and classifier."""

import torch
from torch import nn
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.layers.pooler.seqwise import get_seq_pooling_method
from vllm.model_executor.models.transformers import TransformersForSequenceClassification
from vllm.model_executor.models.utils import WeightsMapper


class SharedGptForSequenceClassification(TransformersForSequenceClassification):
    """Classifies a text by its last token."""

    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"score.": "classifier."})
        # vLLM gives classifiers a dimension more, for those that pick the token themselves.
        self.classifier.__class__ = nn.Linear
        self.token = get_seq_pooling_method(self.default_seq_pooling_type)
        pooler_config = vllm_config.model_config.pooler_config
        self.pooler = DispatchPooler.for_seq_cls(pooler_config, pooling=self.pooled, classifier=self.classifier)

    def pooled(self, hidden_states: torch.Tensor, metadata) -> torch.Tensor:
        """Return what is classified of each text, [texts, hidden], of [tokens, hidden]."""
        return self.token(hidden_states, metadata)


class SharedBertForSequenceClassification(SharedGptForSequenceClassification):
    """Classifies a text by its first token, through the model's pooler."""

    default_seq_pooling_type = "CLS"

    def pooled(self, hidden_states: torch.Tensor, metadata) -> torch.Tensor:
        return self.model.pooler(self.token(hidden_states, metadata)[:, None])
