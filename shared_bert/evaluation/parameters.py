"""The parameters of a config by group, next to those of standard attention."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..conversion.families import FAMILIES
from ..injection.sharing_config import sharing_record
from ..injection.swap import inject
from ..modeling import SelfAttention
from ..modeling.depth_sharing import DepthSharing, SharedMatrix
from ..training.arguments import ConfigArguments
from ..training.models import config_fields, make_model
from ..training.throughput import per_token_modules, training_flops_per_token

# Stock models have their attention's matrices in modules of these names.
_STOCK_ATTENTION = {"attention", "attn", "self_attn", "encoder_attn", "SelfAttention", "EncDecAttention"}


def load_config(path: str | Path, overrides: dict[str, Any] | str | None = None) -> PreTrainedConfig:
    """Read the config of a YAML or JSON file with a `model_type`, or of a saved model's folder.

    A stock model's folder may record what it shares (see `share`).

    Args:
        overrides: fields that replace others: a mapping, or "a=1,b=x".

    Raises:
        ValueError: a missing file, one that is not a config, an unknown field, or an invalid value.
    """
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is not a saved model: it has no config.json")
    source = {"model_name_or_path" if path.is_dir() else "config_name": str(path)}
    try:
        if path.is_dir() and sharing_record(config := AutoConfig.from_pretrained(path, trust_remote_code=False)):
            if overrides:
                raise ValueError("a stock model that shares has no fields to replace")
            return config
        fields = config_fields(ConfigArguments(config_overrides=overrides, **source))
        if fields["model_type"] not in FAMILIES:  # it would be compared with itself
            raise ValueError(f"model_type={fields['model_type']!r} must be one of {', '.join(FAMILIES)}")
        return AutoConfig.for_model(**fields)
    except (StrictDataclassError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Cost:
    """What a model with its head costs.

    Args:
        parameters: their number by group; tied ones count once. "attention" includes the matrices that layers share,
            "other" the norms and the head, with the pooler.
        forward_flops: floating-point operations per token.
    """

    parameters: dict[str, int]
    forward_flops: float

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def model_cost(config: PreTrainedConfig, sequence_length: int) -> Cost:
    """Return the cost of a config's language model, its head at every position; no weights are allocated.

    A coefficient network counts as the coefficients that replace it after training.
    """
    record = sharing_record(config)
    with torch.device("meta"):
        if record is None:
            model = make_model(type(config).from_dict({**config.to_dict(), "coefficient_source": "direct"}))
        else:
            model = _stock_model(config)
            inject(model, replace(record, coefficient_source="direct"))
    return cost_of(model, sequence_length)


def _stock_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the new stock model that a config names; what it shares is not counted in."""
    return getattr(transformers, config.architectures[0])(config)


def _standard_cost(config: PreTrainedConfig, sequence_length: int) -> Cost:
    """Return the cost of the model with attention of its own in every layer."""
    if sharing_record(config) is None:
        return model_cost(config.with_attention(), sequence_length)
    with torch.device("meta"):
        return cost_of(_stock_model(config), sequence_length)


def cost_of(model: PreTrainedModel, sequence_length: int, predicted_share: float = 1.0) -> Cost:
    """Return the cost of a model, of this package or stock.

    Args:
        sequence_length, predicted_share: see `training_flops_per_token`.
    """
    # Backward takes twice the operations of forward.
    return Cost(_parameters_by_group(model), training_flops_per_token(model, sequence_length, predicted_share) / 3)


def _parameters_by_group(model: PreTrainedModel) -> dict[str, int]:
    groups = dict.fromkeys(("attention", "MLP", "embeddings", "other"), 0)
    group_of = {}
    for module in model.modules():
        if isinstance(module, SelfAttention | DepthSharing):
            group_of |= dict.fromkeys(module.modules(), "attention")
        elif isinstance(module, nn.ModuleDict):  # of a stock model that shares
            for name, matrix in module.items():
                if isinstance(matrix, SharedMatrix):
                    group_of |= dict.fromkeys(matrix.modules(), "MLP" if name.startswith("m") else "attention")
        elif isinstance(module, nn.Embedding):
            group_of[module] = "embeddings"
    per_token = per_token_modules(model)
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module in per_token:
            group = "MLP" if _STOCK_ATTENTION.isdisjoint(name.split(".")) else "attention"
            group_of = dict.fromkeys(module.modules(), group) | group_of
    for name, parameter in model.named_parameters():  # gives tied ones once, under their first name
        module = model.get_submodule(name.rpartition(".")[0])
        groups[group_of.get(module, "other")] += parameter.numel()
    return groups


def cost_table(config: PreTrainedConfig, sequence_length: int | None = None) -> str:
    """Format the cost of a config next to standard attention's, by group, with the share saved.

    Args:
        sequence_length: tokens per row, on which the FLOPs depend; None takes `max_position_embeddings`.

    Raises:
        ValueError: a length that is not from 1 to `max_position_embeddings`.
    """
    longest = config.get_text_config().max_position_embeddings
    length = longest if sequence_length is None else sequence_length
    if not 1 <= length <= longest:
        raise ValueError(f"sequence_length={length} must be at least 1 and at most max_position_embeddings={longest}")
    own, standard = model_cost(config, length), _standard_cost(config, length)
    rows = [(group, own.parameters[group], standard.parameters[group]) for group in own.parameters]
    rows.append(("parameters", own.total, standard.total))
    rows.append(("forward FLOPs/token", own.forward_flops, standard.forward_flops))
    shares = sharing_record(config) or config
    lines = [f"{config.model_type}, {shares.attention_scheme}, depth sharing {shares.depth_sharing}; rows of {length}"]
    lines.append(f"{'':20}{'this':>16}{'standard':>16}{'saved':>9}")
    lines += [f"{name:20}{count:16,.0f}{other:16,.0f}{1 - count / other:9.1%}" for name, count, other in rows]
    return "\n".join(lines)
