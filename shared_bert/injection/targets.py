"""Which matrices of a model are attention's, by their names, and how the layers of a model form stacks.

`ATTENTION_NAMES` knows the names that transformers uses. A row that is appended to it makes another naming known.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class AttentionNames:
    """The names of an attention module's matrices, relative to the module that has all of them.

    Args:
        query, key, value, output: of four separate matrices.
        fused: of one matrix in place of the first three. Its rows are those of query, key and value, one after the
            other, or the same within each head if `by_head`.
    """

    output: str
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None
    by_head: bool = False


ATTENTION_NAMES = [
    AttentionNames("o_proj", "q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Gemma, Mistral, ViT, DINOv2
    AttentionNames("out_proj", "q_proj", "k_proj", "v_proj"),  # CLIP, Whisper, BART, OPT, GPT-J
    AttentionNames("output.dense", "self.query", "self.key", "self.value"),  # BERT, RoBERTa, ELECTRA
    AttentionNames("output.dense", "attention.query", "attention.key", "attention.value"),  # YOLOS, DeiT, BEiT
    AttentionNames("output.dense", "self.query_proj", "self.key_proj", "self.value_proj"),  # DeBERTa-v2, -v3
    AttentionNames("output.dense", fused="self.in_proj", by_head=True),  # DeBERTa
    AttentionNames("out_lin", "q_lin", "k_lin", "v_lin"),  # DistilBERT
    AttentionNames("o", "q", "k", "v"),  # T5, MPNet
    AttentionNames("c_proj", fused="c_attn"),  # GPT-2
    AttentionNames("Wo", fused="Wqkv"),  # ModernBERT
    AttentionNames("o_proj", fused="qkv_proj"),  # Phi-3
    AttentionNames("dense", fused="query_key_value", by_head=True),  # GPT-NeoX, BLOOM
]
_CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attention", "cross_attn"}


def is_cross_attention(name: str) -> bool:
    """Whether the matrix `name` is of attention to another sequence, whose query reads what key and value do not."""
    return bool(_CROSS_ATTENTION & set(name.split(".")))


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def stack_patterns(names: Iterable[str]) -> dict[str, str]:
    """Return, for each name, the pattern of its stack: the name with the number of its layer as ``*``.

    The number of the layer is the innermost that differs among names which are the same otherwise.
    """
    members = defaultdict(set)
    candidates = {}
    for name in names:
        parts = name.split(".")
        places = [place for place, part in enumerate(parts) if part.isdigit()]
        candidates[name] = [".".join([*parts[:p], "*", *parts[p + 1 :]]) for p in reversed(places)]
        for pattern in candidates[name]:
            members[pattern].add(name)
    patterns = {}
    for name, found in candidates.items():
        several = [pattern for pattern in found if len(members[pattern]) > 1]
        if several:
            patterns[name] = several[0]
    return patterns


def layer_names(names: Iterable[str], pattern: str) -> list[str]:
    """Return the names that `pattern` stands for, the first layer first."""
    before, after = pattern.split("*")
    form = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    found = {int(match[1]): name for name in names if (match := form.fullmatch(name))}
    return [found[number] for number in sorted(found)]


def find_attention(model: PreTrainedModel) -> list[dict[str, str | bool]]:
    """Return the attention stacks of a base model.

    Returns:
        Of each stack, the patterns of its matrices by role: "query", "key" and "value", or "fused" and "by_head", and
        "output"; and the number of its "heads".

    Raises:
        ValueError: there is none with names of `ATTENTION_NAMES`.
    """
    names = linear_maps(model)
    stacks = []
    seen = set()
    for row in ATTENTION_NAMES:
        roles = {"fused": row.fused} if row.fused else {"query": row.query, "key": row.key, "value": row.value}
        roles["output"] = row.output
        first = next(iter(roles.values()))
        found = []
        for name in names:
            if name == first or name.endswith(f".{first}"):
                module = name.removesuffix(first)
                members = {role: module + path for role, path in roles.items()}
                if all(path in names for path in members.values()) and not seen & set(members.values()):
                    found.append(members)
                    seen |= set(members.values())
        patterns = stack_patterns(members[role] for members in found for role in roles)
        for members in found:
            if all(path in patterns for path in members.values()):
                stack = {role: patterns[path] for role, path in members.items()}
                stack["heads"] = heads_of(model, members["output"])
                if row.fused:
                    stack["by_head"] = row.by_head
                if stack not in stacks:
                    stacks.append(stack)
    if not stacks:
        raise ValueError(
            f"no attention of several layers was found in {type(model).__name__}: none of its matrices have names "
            "that shared_bert.injection.ATTENTION_NAMES knows. Append a row to it, or name them with targets"
        )
    return stacks


def heads_of(base: nn.Module, name: str) -> int:
    """Return the number of query heads of the attention that has the matrix `name`."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = base.get_submodule(path)
        for holder in (module, getattr(module, "config", None)):
            for attribute in ("num_attention_heads", "num_heads", "n_heads", "n_head"):
                heads = getattr(holder, attribute, None)
                if isinstance(heads, int):
                    return heads
    raise ValueError(f"the number of heads of {name} is not known: its module and its config do not tell it")


def find_targets(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Return the patterns of the stacks that hold the matrices named by `targets`.

    Args:
        targets: regular expressions for the ends of names, whole parts of them: "up_proj", "mlp\\.fc[12]".

    Raises:
        ValueError: a name fits no matrix, or one that has no counterpart in another layer.
    """
    names = linear_maps(model)
    patterns = stack_patterns(names)
    found = {}
    for target in targets:
        form = re.compile(rf"(.*\.)?({target})")
        fitting = [name for name in names if form.fullmatch(name)]
        if not fitting:
            raise ValueError(
                f"targets: {target!r} fits no matrix of {type(model).__name__}, which has "
                f"{', '.join(dict.fromkeys(patterns.values()))}"
            )
        alone = [name for name in fitting if name not in patterns]
        if alone:
            raise ValueError(f"targets: {target!r} fits {alone[0]}, which has no counterpart in other layers")
        found |= dict.fromkeys(patterns[name] for name in fitting)
    return list(found)
