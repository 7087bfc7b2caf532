"""Heads of a stock model rotated and reordered before its layers share, attention unchanged (see `alignment`)."""

import copy
import re
import sys

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.alignment import ANY_ROTATION, TURN_OF_PAIRS, Freedom, Turn, align_layers
from ..conversion.dense import SchemeLayer
from ..conversion.depth_fitting import DictionaryGroups
from ..conversion.fitting import Metric
from ..modeling import SCHEMES, Scheme
from .fitting import read_affine, write_affine
from .roles import ROLES, Role
from .sharing_config import SharingConfig
from .targets import is_cross_attention, layer_names, linear_maps

_ROTARY = re.compile(r"[Rr]otary|Rope|ROPE|(^|_)rope(_|$)|rotate_half")
_NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}


def is_rotary(base: PreTrainedModel) -> bool:
    """Return whether queries and keys are rotated by their position (RoPE)."""
    return any(_ROTARY.search(name) for name in vars(sys.modules[type(base).__module__]))


def why_logits_are_fixed(base: PreTrainedModel) -> str | None:
    """Return what a model does to queries and keys that no rotation of both commutes with, or None."""
    names = {part for name, _ in base.named_modules() for part in name.split(".")}
    if _NORMS & names:
        return "norms its queries and keys"
    if any("Disentangled" in type(module).__name__ for module in base.modules()):
        return "uses queries and keys for positions, too"
    if not is_rotary(base):
        return None
    partial = (getattr(base.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if hasattr(base.config, "rotary_dim") or partial != 1:
        return "rotates a part of each head"
    rotate_half = getattr(sys.modules[type(base).__module__], "rotate_half", None)
    if rotate_half is None or rotate_half(torch.arange(4)).tolist() != [-2, -3, 0, 1]:
        return "does not rotate the pairs of channels j and j + head_dim / 2"
    return None


def stack_layers(base: PreTrainedModel, stack: dict[str, str]) -> list[dict[str, str]]:
    """Return the names of the matrices of each layer by role ("query", "key", "value", "output")."""
    maps = linear_maps(base)
    roles = (*ROLES, "output")
    return [
        dict(zip(roles, names, strict=True))
        for names in zip(*(layer_names(maps, stack[role]) for role in roles), strict=True)
    ]


def read_layer(base: PreTrainedModel, names: dict[str, str], scheme: Scheme) -> SchemeLayer:
    """Return a layer's matrices and ingredient in float64; `names` are of its roles and its output."""
    layer = SchemeLayer({})
    for role, matrix in zip(ROLES, scheme.roles, strict=True):
        if matrix != "x" and matrix not in layer.matrices:
            module = base.get_submodule(names[role])
            layer.matrices[matrix] = read_affine(module.map if isinstance(module, Role) else module)
            if getattr(module, "ingredient", None) is not None:
                layer.ingredient = {name: parameter.double() for name, parameter in module.ingredient().items()}
    layer.matrices["o"] = read_affine(base.get_submodule(names["output"]))
    return layer


def write_layer(base: PreTrainedModel, names: dict[str, str], scheme: Scheme, layer: SchemeLayer):
    """Set what `read_layer` reads."""
    written = set()
    for role, matrix in zip(ROLES, scheme.roles, strict=True):
        if matrix != "x" and matrix not in written:
            written.add(matrix)
            module = base.get_submodule(names[role])
            write_affine(module.map if isinstance(module, Role) else module, layer.matrices[matrix])
            if getattr(module, "ingredient", None) is not None:
                for name, parameter in module.ingredient().items():
                    parameter.copy_(layer.ingredient[name])
    write_affine(base.get_submodule(names["output"]), layer.matrices["o"])


def aligned(
    model: PreTrainedModel,
    config: SharingConfig,
    groups: dict[str, DictionaryGroups],
    inputs: dict[str, list[torch.Tensor]],
) -> PreTrainedModel:
    """Return a copy of a model whose layers share nothing yet, with its heads moved; its outputs are the same.

    Heads of fused matrices stay.

    Args:
        groups: of dictionaries, by the name of the list of layers.
        inputs: the autocorrelations of the layers' inputs, by target; empty takes the weights alone.
    """
    result = copy.deepcopy(model)
    base = result.base_model
    for stack in config.attention:
        if "fused" in stack:
            continue
        scheme = SCHEMES["standard"] if is_cross_attention(stack["output"]) else config.scheme
        roles = (*zip(ROLES, scheme.roles, strict=True), ("output", "o"))
        shared = dict.fromkeys(matrix for role, matrix in roles if stack[role] in config.targets)
        if not shared:
            continue
        names = stack_layers(base, stack)
        layers = [read_layer(base, of_layer, scheme) for of_layer in names]
        freedom = _freedom(base, stack, scheme, layers[0])
        of_stack = groups[stack["query"].split(".*.")[0]]
        moved = align_layers(layers, scheme, freedom, shared, config, of_stack, _root(stack, inputs))
        for of_layer, layer in zip(names, moved, strict=True):
            write_layer(base, of_layer, scheme, layer)
    return result


def _root(stack: dict, inputs: dict[str, list[torch.Tensor]]) -> torch.Tensor | None:
    if is_cross_attention(stack["output"]):  # where the query reads something else than key and value
        return None
    seen = next((inputs[stack[role]] for role in ROLES if stack[role] in inputs), None)
    return None if seen is None else Metric.of(torch.stack(seen).mean(0)).root


def _freedom(base: PreTrainedModel, stack: dict, scheme: Scheme, layer: SchemeLayer) -> Freedom:
    per_query = layer.matrices["o"].weight.shape[1] // stack["heads"]
    widths = [len(matrix.weight) for name, matrix in layer.matrices.items() if name != "o"]
    freedom = Freedom.of(scheme, min(widths) // per_query, _turn_of_logits(base, stack))
    freedom.reorders &= not _tells_heads_apart(base, stack)
    return freedom


def _turn_of_logits(base: PreTrainedModel, stack: dict) -> Turn | None:
    if why_logits_are_fixed(base) or _has_more_than_roles(base, stack):
        return None
    return TURN_OF_PAIRS if is_rotary(base) else ANY_ROTATION


def _has_more_than_roles(base: PreTrainedModel, stack: dict) -> bool:
    """Return whether attention has parameters besides its matrices, such as of relative positions."""
    for names in stack_layers(base, stack):
        module, _, _ = names["query"].rpartition(".")
        roles = {name.removeprefix(f"{module}.") for name in names.values()}
        for name, _ in base.get_submodule(module).named_parameters():
            if not any(name.startswith(f"{role}.") for role in roles):
                return True
    return False


def _tells_heads_apart(base: nn.Module, stack: dict) -> bool:
    """Return whether something in the model has an entry per head, such as a bias of positions."""
    roles = {name for names in stack_layers(base, stack) for name in names.values()}
    tensors = [*base.named_parameters(), *base.named_buffers()]
    return any(
        stack["heads"] in tensor.shape
        for name, tensor in tensors
        if not name.endswith("inv_freq") and not any(name.startswith(f"{role}.") for role in roles)
    )
