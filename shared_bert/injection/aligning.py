"""Heads of a stock model rotated and reordered before its layers share, attention unchanged (see `alignment`)."""

import copy
import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.alignment import (
    ANY_ROTATION,
    ROTATION_OF_PAIRS,
    Freedom,
    Rotation,
    align_layers,
    can_align,
    key_width,
)
from ..conversion.dense import SchemeLayer
from ..conversion.depth_fitting import DictionaryGroups
from ..conversion.fitting import Metric
from ..modeling import SCHEMES, Scheme
from .fitting import read_affine, write_affine
from .roles import ROLES, Role
from .sharing_config import SharingConfig
from .targets import is_cross_attention, layer_names, linear_maps

# Classes of transformers' attention whose heads are free: to stand in any order, values and outputs to be rotated, and
# queries and keys to be rotated as is named. Only classes that were tested are here, since there are many forms of
# what a class does to its heads besides (a gate, a norm, a bias of positions).
FREE_HEADS: dict[str, Rotation | None] = {
    **dict.fromkeys(
        (
            "LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "GemmaAttention",
            "Gemma2Attention", "GraniteAttention", "Starcoder2Attention",
        ),
        ROTATION_OF_PAIRS,
    ),
    **dict.fromkeys(("Qwen3Attention", "Gemma3Attention")),  # which norm queries and keys
    **dict.fromkeys(
        (
            "BertSelfAttention", "RobertaSelfAttention", "XLMRobertaSelfAttention", "ElectraSelfAttention",
            "DistilBertSelfAttention", "ViTAttention", "DeiTAttention", "Dinov2SelfAttention", "Dinov2Attention",
            "CLIPAttention", "SiglipAttention", "WhisperAttention", "BartAttention", "OPTAttention",
        ),
        ANY_ROTATION,
    ),
}  # fmt: skip
STACK_ROLES = (*ROLES, "output")
_ROTARY = re.compile(r"[Rr]otary|Rope|ROPE|(^|_)rope(_|$)|rotate_half")
_NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}


def attention_module(base: PreTrainedModel, stack: dict[str, str]) -> nn.Module:
    """Return the first layer's module that has the query's matrix."""
    name, _, _ = layer_names(linear_maps(base), stack["query"])[0].rpartition(".")
    return base.get_submodule(name)


def is_rotary(attention: nn.Module) -> bool:
    """Return whether queries and keys are rotated by their position (RoPE)."""
    return any(_ROTARY.search(name) for name in _names_around(attention))


def why_logits_are_fixed(attention: nn.Module, config: PreTrainedConfig) -> str | None:
    """Return what attention does to queries and keys, for which no fit of a scheme is known, or None.

    Args:
        config: of the model, where the attention has none.
    """
    if _NORMS & {part for name, _ in attention.named_modules() for part in name.split(".")}:
        return "norms its queries and keys"
    if "Disentangled" in type(attention).__name__:
        return "uses queries and keys for positions, too"
    if not is_rotary(attention):
        return None
    config = getattr(attention, "config", config)
    rope = getattr(config, "rope_parameters", None) or {}
    by_type = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if hasattr(config, "rotary_dim") or any(each.get("partial_rotary_factor", 1.0) != 1 for each in by_type):
        return "rotates a part of each head"
    rotations = [value for name, value in _names_around(attention).items() if name.startswith("rotate_half")]
    if not rotations or any(rotate(torch.arange(4)).tolist() != [-2, -3, 0, 1] for rotate in rotations):
        return "does not rotate the pairs of channels j and j + head_dim / 2"
    return None


def _names_around(attention: nn.Module) -> dict[str, Any]:
    """Return what is defined in attention's class and its bases, and in their files."""
    names = {}
    for cls in type(attention).__mro__:
        if issubclass(cls, nn.Module) and cls is not nn.Module:
            names |= {**vars(sys.modules[cls.__module__]), **vars(cls)}
    return names


def stack_layers(base: PreTrainedModel, stack: dict[str, str]) -> list[dict[str, str]]:
    """Return the names of the matrices of each layer by role ("query", "key", "value", "output")."""
    maps = linear_maps(base)
    return [
        dict(zip(STACK_ROLES, names, strict=True))
        for names in zip(*(layer_names(maps, stack[role]) for role in STACK_ROLES), strict=True)
    ]


def read_layer(base: PreTrainedModel, names: dict[str, str], scheme: Scheme) -> SchemeLayer:
    """Return a layer's matrices and ingredient in float64; `names` are of its roles and its output."""
    layer = SchemeLayer({})
    for role, matrix in zip(ROLES, scheme.roles, strict=True):
        if matrix != "x" and matrix not in layer.matrices:
            module = base.get_submodule(names[role])
            layer.matrices[matrix] = read_affine(module)
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


def stacks_to_align(base: PreTrainedModel, config: SharingConfig) -> list[tuple[dict, Rotation | None]]:
    """Return the attention stacks with free heads whose layers share matrices, and how queries and keys may rotate."""
    stacks = []
    for stack in config.attention:
        if can_align(config) and "fused" not in stack and {stack[role] for role in STACK_ROLES} & set(config.targets):
            cls = type(attention_module(base, stack))
            if cls.__module__.startswith("transformers.models.") and cls.__name__ in FREE_HEADS:
                stacks.append((stack, FREE_HEADS[cls.__name__]))
    return stacks


def aligned(
    model: PreTrainedModel,
    config: SharingConfig,
    groups: dict[str, DictionaryGroups],
    inputs: dict[str, list[torch.Tensor]],
) -> PreTrainedModel:
    """Return a copy of a model whose layers share nothing yet, with the heads of `stacks_to_align` moved.

    Its outputs are the same, but for rounding in the model's dtype.

    Args:
        groups: of dictionaries, by the name of the list of layers.
        inputs: the autocorrelations of the layers' inputs, by target; empty takes the weights alone.
    """
    stacks = stacks_to_align(model.base_model, config)
    result = copy.deepcopy(model)
    base = result.base_model
    for stack, rotation in stacks:
        scheme = SCHEMES["standard"] if is_cross_attention(stack["output"]) else config.scheme
        roles = zip(STACK_ROLES, (*scheme.roles, "o"), strict=True)
        shared = dict.fromkeys(matrix for role, matrix in roles if stack[role] in config.targets)
        names = stack_layers(base, stack)
        layers = [read_layer(base, of_layer, scheme) for of_layer in names]
        head_dim = layers[0].matrices["o"].weight.shape[1] // stack["heads"]
        freedom = Freedom.of(scheme, key_width(layers[0]) // head_dim, rotation)
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
