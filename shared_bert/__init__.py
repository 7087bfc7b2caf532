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

from .modeling import *  # noqa: F403 - the names are listed in modeling.__all__
from .modeling import __all__ as __all__
from .modeling import (
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

__version__ = "0.1.0"

for config, tokenizer, models in (
    (
        SharedBertConfig,
        BertTokenizer,
        {
            AutoModel: SharedBertModel,
            AutoModelForMaskedLM: SharedBertForMaskedLM,
            AutoModelForSequenceClassification: SharedBertForSequenceClassification,
            AutoModelForTokenClassification: SharedBertForTokenClassification,
            AutoModelForQuestionAnswering: SharedBertForQuestionAnswering,
            AutoModelForMultipleChoice: SharedBertForMultipleChoice,
        },
    ),
    (
        SharedGptConfig,
        GPT2Tokenizer,
        {
            AutoModel: SharedGptModel,
            AutoModelForCausalLM: SharedGptForCausalLM,
            AutoModelForSequenceClassification: SharedGptForSequenceClassification,
            AutoModelForTokenClassification: SharedGptForTokenClassification,
        },
    ),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)
    for auto, model in models.items():
        auto.register(config, model, exist_ok=True)
del config, tokenizer, models, auto, model
