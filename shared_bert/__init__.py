"""Attention that shares its weights, for Hugging Face Transformers.

Importing the package registers its models and tokenizers with the Auto classes.
"""

import transformers
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer

from . import conversion, hub, modeling
from .conversion import *  # noqa: F403 - each folder's __all__ is the list
from .modeling import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [*modeling.__all__, *conversion.__all__]


def _register(config, tokenizer):
    """Makes the Auto classes know a model, and every saved model carry its code and say which class is where."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)
    config.register_for_auto_class()
    for auto_name, name in config.auto_classes.items():
        auto, model = getattr(transformers, auto_name), getattr(modeling, name)
        auto.register(config, model, exist_ok=True)
        # Trainer, for one, tells by these names which labels to shift.
        auto._model_mapping._model_mapping.setdefault(config.model_type, name)
        model.register_for_auto_class(auto_name)


_register(modeling.SharedBertConfig, BertTokenizer)
_register(modeling.SharedGptConfig, GPT2Tokenizer)
# modeling/ goes to the Hub as code and knows nothing of cards.
modeling.SharedBertPreTrainedModel.push_to_hub = hub.push_to_hub
modeling.SharedGptPreTrainedModel.push_to_hub = hub.push_to_hub
