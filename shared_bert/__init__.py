"""Attention that shares its weights, for Hugging Face Transformers.

Importing the package registers its models and tokenizers with the Auto classes.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertTokenizer,
    GPT2Tokenizer,
)

from . import conversion, modeling
from .conversion import *  # noqa: F403 - each folder's __all__ is the list
from .modeling import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*modeling.__all__, *conversion.__all__]


def _register(config, tokenizer, models):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)
    for auto, model in models.items():
        auto.register(config, model, exist_ok=True)
        # Trainer, for one, tells by these names which labels to shift.
        auto._model_mapping._model_mapping.setdefault(config.model_type, model.__name__)


_register(
    modeling.SharedBertConfig,
    BertTokenizer,
    {
        AutoModel: modeling.SharedBertModel,
        AutoModelForMaskedLM: modeling.SharedBertForMaskedLM,
        AutoModelForSequenceClassification: modeling.SharedBertForSequenceClassification,
        AutoModelForTokenClassification: modeling.SharedBertForTokenClassification,
        AutoModelForQuestionAnswering: modeling.SharedBertForQuestionAnswering,
        AutoModelForMultipleChoice: modeling.SharedBertForMultipleChoice,
    },
)
_register(
    modeling.SharedGptConfig,
    GPT2Tokenizer,
    {
        AutoModel: modeling.SharedGptModel,
        AutoModelForCausalLM: modeling.SharedGptForCausalLM,
        AutoModelForSequenceClassification: modeling.SharedGptForSequenceClassification,
        AutoModelForTokenClassification: modeling.SharedGptForTokenClassification,
    },
)
