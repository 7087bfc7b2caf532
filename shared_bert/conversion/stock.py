"""From this package's models to stock ones of the same outputs, and from stock ones to ``standard`` ones."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..modeling import SelfAttention, SharedAttentionConfig
from ..modeling.depth_sharing import DepthSharing
from ..modeling.loading import check_loaded
from ..modeling.stock_names import write_stock_names
from .dense import dense_layers
from .families import SHARED_CLASSES, STOCK_CLASSES, family_of


@torch.no_grad()
def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply the matrices of a `Shared…` model out into the stock model of the same head.

    Every scheme and every depth sharing can be expressed so: an identity query becomes the identity matrix, a factor
    on the logits part of the query, a missing bias zeros, and grouped keys are repeated. The copy has the model's
    dtype, device and mode, gives the same outputs, and needs nothing of this package. In half precision, products of
    stored matrices are rounded to it: convert `model.float()` to be exact. (GPT-2's sequence classifier finds the end
    of a text by `pad_token_id` only, not by the mask.)

    Raises:
        ValueError: the model is none of `STOCK_CLASSES` (a head of one's own, a model wrapped by adapters), or its
            weights are offloaded.
    """
    stock_class = STOCK_CLASSES.get(type(model))
    if stock_class is None:
        raise ValueError(
            f"{type(model).__name__} has no stock counterpart; to_stock takes "
            f"{', '.join(cls.__name__ for cls in STOCK_CLASSES)} (merge adapters first)"
        )
    check_loaded(model)
    family = family_of(model.config)
    state = _standard_state(model)
    for name, module in model.named_modules():
        if hasattr(module, "stock_names"):
            write_stock_names(module, state, f"{name}.")
    for ours, names in family.other_names.items():
        if ours in state:
            state |= dict.fromkeys(names, state[ours])
    config = family.to_stock_config(model.config)
    if "qa_outputs.weight" in state:
        config.num_labels = 2  # a start and an end, whatever the labels of the checkpoint were
    stock = build_like(stock_class, config, model)
    # Stock models have biases everywhere.
    zeros = {n: torch.zeros_like(p) for n, p in stock.named_parameters() if n.endswith("bias") and n not in state}
    stock.load_state_dict(state | zeros)
    return stock


def _standard_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state dict that a ``standard`` model of the same outputs has."""
    modules = dict(model.named_modules())
    attention = [name for name, module in modules.items() if isinstance(module, SelfAttention)]
    replaced = [name for name, module in modules.items() if isinstance(module, SelfAttention | DepthSharing)]
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{module}.") for module in replaced)
    }
    for name, layer in zip(attention, dense_layers(model), strict=True):
        roles = (layer.query, layer.key, layer.value)
        state[f"{name}.projection.weight"] = torch.cat([role.weight for role in roles])
        state[f"{name}.projection.bias"] = torch.cat([role.bias for role in roles])
        state[f"{name}.output.weight"], state[f"{name}.output.bias"] = layer.output.weight, layer.output.bias
    return state


@torch.no_grad()
def read_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Return the ``standard`` model of this package with the weights, and so the outputs, of a stock model.

    Raises:
        ValueError: naming an architecture, a head or an option of GPT-2 that has no counterpart.
    """
    config = standard_config(model)
    shared = build_like(SHARED_CLASSES[type(model)], config, model)
    shared.load_state_dict(model.state_dict())
    return shared


def build_like(cls: type, config: PreTrainedConfig, like: PreTrainedModel) -> PreTrainedModel:
    """Make a model of `config` in the dtype, on the device, in the mode and with the generation config of another."""
    has_no_pooler = hasattr(like, "pooler") and like.pooler is None
    model = cls(config, **({"add_pooling_layer": False} if has_no_pooler else {}))
    model.set_attn_implementation(like.config._attn_implementation)
    if getattr(like, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device, like.dtype).train(like.training)


def standard_config(model: PreTrainedModel) -> SharedAttentionConfig:
    """Return the config that `read_stock` gives a stock model, and raise its errors."""
    if type(model) not in SHARED_CLASSES:
        raise ValueError(
            f"{type(model).__name__} cannot be converted; from_stock takes "
            f"{', '.join(cls.__name__ for cls in SHARED_CLASSES)} and the models of this package"
        )
    config = model.config
    for option in ("is_decoder", "add_cross_attention", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if getattr(config, option, False):
            raise ValueError(f"{type(model).__name__} with {option}=True cannot be converted: turn the option off")
    return family_of(config).from_stock_config(config)
