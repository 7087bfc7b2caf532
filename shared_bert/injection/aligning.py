"""Heads of a stock model rotated and reordered before its layers share, attention unchanged (see `alignment`)."""

import copy
import re
import sys
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.alignment import ANY_ROTATION, TURN_OF_PAIRS, Freedom, Turn, align_layers
from ..conversion.dense import SchemeLayer
from ..conversion.depth_fitting import DictionaryGroups
from ..conversion.fitting import Metric
from ..modeling import SCHEMES, Scheme
from .fitting import read_affine, write_affine
from .roles import ROLES, Role
from .sharing_config import SharingConfig
from .targets import is_cross_attention, layer_names, linear_maps

# Classes of attention whose heads are free: to stand in any order, values and outputs to turn, and queries and keys to
# take the turn that is named. Only classes that were tested are here, since what a class does besides to its heads (a
# gate, a norm, a bias of positions) has many forms. Append others that are free.
FREE_HEADS: dict[str, Turn | None] = {
    **dict.fromkeys(
        (
            "LlamaAttention", "MistralAttention", "MixtralAttention", "Qwen2Attention", "GemmaAttention",
            "Gemma2Attention", "GraniteAttention", "Starcoder2Attention",
        ),
        TURN_OF_PAIRS,
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
_ROTARY = re.compile(r"[Rr]otary|Rope|ROPE|(^|_)rope(_|$)|rotate_half")
_NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"}


def attention_module(base: PreTrainedModel, stack: dict[str, str]) -> nn.Module:
    """Return the first layer's module that has the query's matrix."""
    name, _, _ = layer_names(linear_maps(base), stack["query"])[0].rpartition(".")
    return base.get_submodule(name)


def is_rotary(attention: nn.Module) -> bool:
    """Return whether queries and keys are rotated by their position (RoPE)."""
    return any(_ROTARY.search(name) for name in (*_module_of(attention), *vars(type(attention))))


def why_logits_are_fixed(attention: nn.Module, config: PreTrainedConfig) -> str | None:
    """Return what attention does to queries and keys, for which no fit of a scheme is known, or None."""
    if _NORMS & {part for name, _ in attention.named_modules() for part in name.split(".")}:
        return "norms its queries and keys"
    if "Disentangled" in type(attention).__name__:
        return "uses queries and keys for positions, too"
    if not is_rotary(attention):
        return None
    partial = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    if hasattr(config, "rotary_dim") or partial != 1:
        return "rotates a part of each head"
    rotations = [function for name, function in _module_of(attention).items() if name.startswith("rotate_half")]
    if not rotations or any(rotate(torch.arange(4)).tolist() != [-2, -3, 0, 1] for rotate in rotations):
        return "does not rotate the pairs of channels j and j + head_dim / 2"
    return None


def _module_of(attention: nn.Module) -> dict[str, Any]:
    return vars(sys.modules[type(attention).__module__])


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


def aligned(
    model: PreTrainedModel,
    config: SharingConfig,
    groups: dict[str, DictionaryGroups],
    inputs: dict[str, list[torch.Tensor]],
) -> PreTrainedModel:
    """Return a copy of a model whose layers share nothing yet, with its heads moved; its outputs are the same.

    Only heads of `FREE_HEADS` move.

    Args:
        groups: of dictionaries, by the name of the list of layers.
        inputs: the autocorrelations of the layers' inputs, by target; empty takes the weights alone.
    """
    result = copy.deepcopy(model)
    base = result.base_model
    for stack in config.attention:
        if "fused" in stack or type(attention_module(base, stack)).__name__ not in FREE_HEADS:
            continue
        scheme = SCHEMES["standard"] if is_cross_attention(stack["output"]) else config.scheme
        roles = (*zip(ROLES, scheme.roles, strict=True), ("output", "o"))
        shared = dict.fromkeys(matrix for role, matrix in roles if stack[role] in config.targets)
        if not shared:
            continue
        names = stack_layers(base, stack)
        layers = [read_layer(base, of_layer, scheme) for of_layer in names]
        head_dim = layers[0].matrices["o"].weight.shape[1] // stack["heads"]
        heads = min(len(matrix.weight) for name, matrix in layers[0].matrices.items() if name != "o") // head_dim
        freedom = Freedom.of(scheme, heads, FREE_HEADS[type(attention_module(base, stack)).__name__])
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
