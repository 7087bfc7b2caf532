"""The swap: the targets of a stock model for linear maps that share, and back."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.configuration_shared_attention import check_sizes
from ..modeling.depth_sharing import SharedMatrix
from .linear import MadeLinear, OwnMap, SharedMap, features
from .roles import ROLES, IngredientParameters, Role
from .sharing_config import SharingConfig
from .targets import is_cross_attention, layer_names, linear_maps

# The attribute, on the module that holds the layers, with the matrices they share.
SHARED = "shared_matrices"


def inject(model: PreTrainedModel, config: SharingConfig):
    """Swap the targets of a stock model for modules that share, with parameters that are not yet set.

    A stack that the model does not have is passed over: a part of a model, such as one of two encoders, loads from
    the folder of the whole.

    Raises:
        ValueError: the model has none of the stacks, or a target's matrices cannot share.
    """
    base = model.base_model
    maps = linear_maps(base)
    wanted = [*config.targets, *(stack["output"] for stack in config.attention)]
    if not any(layer_names(maps, pattern) for pattern in wanted):
        raise ValueError(f"{type(model).__name__} has none of the matrices {', '.join(dict.fromkeys(wanted))}")
    for target in config.targets:
        _share_depth(base, maps, config, target)
    if config.attention_scheme != "standard":
        for stack in config.attention:
            _share_roles(base, maps, config, stack)


def _share_depth(base: nn.Module, maps: dict[str, nn.Module], config: SharingConfig, target: str):
    names = layer_names(maps, target)
    if not names:
        return
    replaced = [maps[name] for name in names]
    shapes = {tuple(module.weight.shape) for module in replaced}
    if len(shapes) > 1:
        raise ValueError(f"the matrices of {target} have different shapes and cannot share: {sorted(shapes)}")
    widths, heads = row_parts(maps, config, target)
    size = features(replaced[0])[1]
    sizes = {name: getattr(config, name) for name in ("num_atoms", "num_groups", "rank", "layer_ranks")}
    limits = {f"the layers of {target}": len(names), f"the width of {target}": max(*widths, size)}
    check_sizes(config.depth_sharing, sizes, limits)

    dictionaries = []
    if config.depth_sharing != "low_rank":
        like = replaced[0].weight
        dictionaries = [SharedMatrix(config, len(names), width, size).to(like) for width in widths]
        shared = _shared_matrices(base, target)
        for name, matrix in zip(_dictionary_names(config, target), dictionaries, strict=True):
            shared[name] = matrix
    for layer, (name, rank) in enumerate(zip(names, config.ranks(target, len(names)), strict=True)):
        shared_map = SharedMap(replaced[layer], dictionaries, layer, rank, heads)
        maps[name] = MadeLinear(replaced[layer], shared_map)
        base.set_submodule(name, maps[name])


def row_parts(maps: dict[str, nn.Module], config: SharingConfig, target: str) -> tuple[list[int], int | None]:
    """Return the widths of the matrices of a target, which are three if it is fused, and its heads if by head."""
    out_features, _ = features(maps[layer_names(maps, target)[0]])
    stack = next((stack for stack in config.attention if stack.get("fused") == target), None)
    if stack is None:
        return [out_features], None
    _, query = features(maps[layer_names(maps, stack["output"])[0]])
    widths = [query, *[(out_features - query) // 2] * 2]
    return widths, stack["heads"] if stack["by_head"] else None


def _dictionary_names(config: SharingConfig, target: str) -> list[str]:
    """Return the names of what a target's layers share: "q0", "k0" and "v0" in the first attention stack.

    They have nothing in common with names of stock models, which transformers may rename when it saves and loads.
    """
    for number, stack in enumerate(config.attention):
        if stack.get("fused") == target:
            return [f"{letter}{number}" for letter in "qkv"]
        for role in ("query", "key", "value", "output"):
            if stack.get(role) == target:
                return [f"{'o' if role == 'output' else role[0]}{number}"]
    return [f"m{config.targets.index(target)}"]


def _owner(target: str) -> str:
    """Return the name of the module that holds the list of layers: "encoder" for "encoder.layer.*.output.dense"."""
    return target.split(".*.")[0].rpartition(".")[0]


def _shared_matrices(base: nn.Module, target: str) -> nn.ModuleDict:
    owner = base.get_submodule(_owner(target))
    if not hasattr(owner, SHARED):
        setattr(owner, SHARED, nn.ModuleDict())
    return getattr(owner, SHARED)


def _share_roles(base: nn.Module, maps: dict[str, nn.Module], config: SharingConfig, stack: dict):
    if is_cross_attention(stack["output"]):
        return
    scheme = config.scheme
    for names in zip(*(layer_names(maps, stack[role]) for role in ROLES), strict=True):
        names = dict(zip(ROLES, names, strict=True))
        made: dict[str, Role] = {}  # the first role of each matrix
        for role, name in names.items():
            replaced, matrix = maps[name], getattr(scheme, role)
            out_features, in_features = features(replaced)
            source = made.get(matrix)
            channels = in_features if matrix == "x" else (source or replaced).out_features
            if out_features != channels:
                raise ValueError(
                    f"attention_scheme={config.attention_scheme!r}: the {role} of {name} has {out_features} channels, "
                    f"and what it is made from has {channels}"
                )
            own_map = ingredient = None
            like = torch.empty(0, device=base.device, dtype=base.dtype)
            if matrix != "x" and source is None:
                own_map = replaced.map if isinstance(replaced, MadeLinear) else OwnMap(replaced)
                if matrix == scheme.query and scheme.ingredient.shapes(1, 1):
                    heads = stack["heads"]
                    ingredient = IngredientParameters(scheme.ingredient, heads, out_features // heads).to(like)
            maps[name] = Role(role, scheme, replaced, own_map, source, ingredient)
            if matrix == "x":
                maps[name].register_buffer("like", like, persistent=False)  # it follows the model's device and dtype
            else:
                made.setdefault(matrix, maps[name])
            base.set_submodule(name, maps[name])


def multiply_out(model: PreTrainedModel):
    """Swap everything that shares in a model for stock modules with the matrices it makes."""
    stock = {name: m.multiplied_out() for name, m in model.named_modules() if isinstance(m, MadeLinear)}
    for name, module in stock.items():
        model.set_submodule(name, module)
    for module in list(model.modules()):
        if hasattr(module, SHARED):
            delattr(module, SHARED)
