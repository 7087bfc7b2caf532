"""Making the model that the arguments describe."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import shared_bert

from ..conversion.families import AUTO_CLASSES, FAMILIES
from ..injection import share
from .arguments import ConfigArguments
from .checkpoints import UNFINISHED, publish
from .yaml_files import check_keys, load_mapping


def pretraining_objective(model_type: str) -> str | None:
    """Return what a language model is pre-trained to predict: "mlm" (masked tokens) or "clm" (the next token).

    It is None for a type of which neither this package nor transformers has a language model.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type].objective
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "mlm"
    return "clm" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def config_fields(arguments: ConfigArguments) -> dict[str, Any]:
    """Return the stated fields of the config with its `model_type`, overrides last.

    Raises:
        ValueError: a model type that is no language model's, two that differ, a trained model of transformers, or an
            unknown field.
    """
    if arguments.model_name_or_path:
        stated = AutoConfig.from_pretrained(arguments.model_name_or_path, trust_remote_code=False).to_dict()
    else:
        stated = load_mapping(arguments.config_name) if arguments.config_name else {}
    source = arguments.model_name_or_path or arguments.config_name
    model_type = stated.setdefault("model_type", arguments.model_type)
    if pretraining_objective(model_type) is None or (arguments.model_name_or_path and model_type not in FAMILIES):
        others = "" if arguments.model_name_or_path else ", or a language model of transformers"
        raise ValueError(f"model_type={model_type!r} of {source} must be one of {', '.join(FAMILIES)}{others}")
    if arguments.model_type not in (None, model_type):
        raise ValueError(f"model_type={arguments.model_type!r}, but {source} describes a {model_type}")
    overrides = arguments.config_overrides or {}
    valid = {field.name for field in fields(type(AutoConfig.for_model(model_type)))}
    if not arguments.model_name_or_path:
        check_keys(stated, valid | {"model_type", "auto_map"}, source)
    check_keys(overrides, valid, "config_overrides")
    return {**stated, **overrides}


def new_config(stated: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of `config_fields`, without special tokens unless stated: a tokenizer will name them."""
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    return AutoConfig.for_model(**{**ids, **stated})


def make_model(
    config: PreTrainedConfig,
    model_name_or_path: str | None = None,
    attn_implementation: str | None = None,
    sharing: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Return a new model of `config`, or load a trained one, with its head and float32 weights.

    Args:
        sharing: options of `share` for a new model of transformers.

    Raises:
        ValueError: the trained model's weights are not those of this one; see `share`.
    """
    auto_class = AUTO_CLASSES[pretraining_objective(config.model_type)]
    options = {"dtype": torch.float32, "attn_implementation": attn_implementation}
    if model_name_or_path is None:
        model = auto_class.from_config(config, **options)
        return share(model, initialize=True, **sharing)[0] if sharing else model
    model, info = auto_class.from_pretrained(model_name_or_path, config=config, output_loading_info=True, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            weights = ", ".join(map(str, sorted(info[problem])[:3]))
            raise ValueError(
                f"{model_name_or_path=} is not a {type(model).__name__} like this one: "
                f"{problem.replace('_', ' ')} {weights}"
            )
    return model


def check_length(config: PreTrainedConfig, option: str, length: int):
    """Raise a ValueError if rows of `length` tokens, which an option asks for, are longer than a model can read."""
    most = getattr(config.get_text_config(), "max_position_embeddings", length)
    if length > most:
        raise ValueError(f"{option}={length} is more than the model's max_position_embeddings={most}")


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase):
    """Raise a ValueError if a tokenizer has more tokens than a model."""
    if len(tokenizer) > (size := config.get_text_config().vocab_size):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size={size}")


def restore_use_cache(config: PreTrainedConfig):
    """Set `use_cache`, which Trainer has turned off, to true in a config that has it; remove it from others."""
    if "use_cache" in config.__dataclass_fields__:
        config.use_cache = True
    else:
        vars(config).pop("use_cache", None)


def fix_saved_coefficients(folder: Path, model_class: type[PreTrainedModel]):
    """Replace the networks that make the coefficients of a saved model, if any, by these.

    Args:
        model_class: of the model that was saved; FSDP2 trains a class of its own, derived from it.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    record = getattr(config, "quantization_config", None) or config.to_dict()  # of a stock model that shares
    if record.get("coefficient_source", "direct") == "direct":
        return
    saved_class = next(cls for cls in model_class.__mro__ if cls.__name__ == config.architectures[0])
    model = saved_class.from_pretrained(folder)
    shared_bert.fix_coefficients(model)
    model.save_pretrained(folder / UNFINISHED)
    publish(folder / UNFINISHED, folder)
