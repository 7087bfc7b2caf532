"""Loading from safetensors only: nothing that could run code or is truncated."""

from safetensors import SafetensorError
from torch import nn


def check_loaded(model: nn.Module):
    """Raise a ValueError if weights are on the meta device: not loaded yet, or offloaded."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has weights on the meta device, not loaded or offloaded: load all of them first")


class SafetensorsOnly:
    """A model class whose `from_pretrained` reads no pickle."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, **kwargs):
        """Load a model like `PreTrainedModel.from_pretrained`, from safetensors only.

        Raises:
            ValueError: the weights are damaged, or pickled ones are asked for.
            OSError: there are no weights in safetensors.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which can run code: omit it")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path} cannot be loaded, its weights are damaged: {error}"
            ) from error
