"""What models are loaded from: safetensors, and nothing that could run code or has been cut off."""

from safetensors import SafetensorError
from torch import nn


def check_loaded(model: nn.Module):
    """Raise a ValueError where weights are on the device meta: not loaded yet, or offloaded."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has weights on the device meta, not loaded or offloaded: load it whole first")


class SafetensorsOnly:
    """Gives a model class a `from_pretrained` that reads no pickle."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, **kwargs):
        """Loads a model as `PreTrainedModel.from_pretrained` does, from safetensors only.

        Raises:
            ValueError: the weights are damaged, or pickled ones are asked for.
            OSError: there are no weights in safetensors.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which can run code: leave it out")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} cannot be loaded, its weights are damaged: {error}"
            ) from error
