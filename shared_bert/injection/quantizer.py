"""Models that share, saved and loaded by transformers itself.

transformers lets a library rebuild a model between its construction and the loading of its weights, by a quantizer.
The record of what is shared is the `quantization_config` of the model's config, by which `from_pretrained` finds
`SharingQuantizer`, if `shared_bert` has been imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer

from ..modeling.depth_sharing import SharedMatrix
from ..modeling.projections import LowRankLinear
from .linear import OwnMap, SharedMap
from .roles import IngredientParameters
from .sharing_config import METHOD
from .swap import inject, multiply_out


@register_quantizer(METHOD)
class SharingQuantizer(HfQuantizer):
    """Rebuilds what a model shares before its weights are loaded; `dequantize` multiplies it out."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True
    is_loading = False
    gathered = None

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args, **kwargs):
        if not self.pre_quantized:
            raise ValueError(
                "a SharingConfig is part of a saved model and no option of from_pretrained: load the stock model, and "
                "call shared_bert.share"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        inject(model, self.quantization_config)
        self.is_loading = True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.is_loading:
            _check_loaded(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict | None, dict]:
        """Return what `save_pretrained` writes: the state dict given to it, which transformers drops, or None."""
        if self.gathered is None and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise ValueError(
                "the parameters are sharded: train it with shared_bert.training.SafeTrainer, which saves them all"
            )
        return self.gathered, {}

    @contextmanager
    def saving(self, state_dict: dict | None) -> Iterator[None]:
        """Let `save_pretrained` write `state_dict`, which has been gathered from all processes."""
        self.gathered = state_dict
        try:
            yield
        finally:
            self.gathered = None

    def dequantize(self, model: PreTrainedModel, dtype=None) -> PreTrainedModel:
        """Turn a model that shares into the stock model of the same outputs, in its own dtype if none is given."""
        multiply_out(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules with parameters that stock models do not have."""
    kinds = OwnMap | SharedMap | SharedMatrix | LowRankLinear | IngredientParameters
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _check_loaded(model: nn.Module):
    """Raise a ValueError if transformers has not found a parameter that it cannot initialise."""
    for module_name, module in own_modules(model).items():
        for name, parameter in module.named_parameters(module_name):
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False):
                raise ValueError(f"the weights of the model lack {name}, which its layers share")
