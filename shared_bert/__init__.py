"""Attention that shares its weights, for Hugging Face Transformers.

Importing the package registers its models and tokenizers with the Auto classes.
"""

from . import conversion, hub, injection, modeling
from .conversion import *  # noqa: F403 - each folder's __all__ is the list
from .injection import *  # noqa: F403
from .modeling import *  # noqa: F403
from .modeling.loading import SafetensorsOnly

__version__ = "0.1.0"
__all__ = [*modeling.__all__, *conversion.__all__, *injection.__all__]


# modeling/ goes to the Hub as code and knows nothing of cards.
SafetensorsOnly.push_to_hub = hub.push_to_hub
