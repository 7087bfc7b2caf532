"""Recipes: YAML files of arguments, and the command line that overrides them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..command_line import RaisingParser
from .arguments import DataArguments, ModelArguments, PretrainingArguments, read_overrides
from .yaml_files import check_keys, load_mapping

_DATACLASSES = (ModelArguments, DataArguments, PretrainingArguments)
# The keys of a recipe that an option replaces, since they would contradict it.
_REPLACED_BY = {
    "train_file": ("dataset_name", "dataset_config_name"),
    "dataset_name": ("train_file", "validation_file"),
    "model_name_or_path": (
        "config_name", "config_overrides", "model_type", "sharing", "tokenizer_name", "tokenizer_vocab_size",
    ),
    "tokenizer_name": ("tokenizer_vocab_size",),
    "tokenizer_vocab_size": ("tokenizer_name",),
}  # fmt: skip


def parse_arguments(
    arguments: Sequence[str],
    dataclasses: Sequence[type],
    adapt: Callable[[dict[str, Any], set[str], Path], None] | None = None,
) -> tuple:
    """Read `[RECIPE.yaml] [--option value ...]` into dataclasses; options override the recipe.

    Args:
        arguments: of the command line, without the program's name.
        adapt: changes the recipe in place, given the names of the options and the recipe's folder.

    Raises:
        ValueError: an unknown key or option, or a value of the wrong type.
    """
    recipe, where = {}, "command line"
    if arguments and not arguments[0].startswith("-"):
        where, *arguments = arguments
        recipe = load_mapping(where)
        check_keys(recipe, _option_names(dataclasses), where)
        if adapt is not None:
            adapt(recipe, {_option_name(a) for a in arguments if a.startswith("--")}, Path(where).parent)
    return parse_mapping(recipe, dataclasses, where, arguments)


def parse_mapping(
    recipe: Mapping[str, Any], dataclasses: Sequence[type], where: str, arguments: Sequence[str] = ()
) -> tuple:
    """Read a mapping, and options that override it, into dataclasses.

    Args:
        where: what an error calls the mapping.

    Raises:
        ValueError: see `parse_arguments`.
    """
    parser = RaisingParser(dataclasses, allow_abbrev=False)
    valid = _option_names(dataclasses)
    check_keys(recipe, valid, where)
    # As strings, numbers are checked like those of the command line.
    parser.set_defaults(**{k: str(v) if type(v) in (int, float) else v for k, v in recipe.items()})
    *parsed, rest = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        check_keys([_option_name(rest[0])], valid, "command line")
        raise ValueError(f"command line: {rest[0]!r} is not an option; write --name value")
    return tuple(parsed)


def _option_names(dataclasses: Sequence[type]) -> set[str]:
    return {field.name for dataclass in dataclasses for field in fields(dataclass)}


def parse_recipe(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Read `[RECIPE.yaml] [--option value ...]` into the arguments of `pretrain`; see `parse_arguments`.

    A source of text, a model or a tokenizer among the options replaces the recipe's of another kind; the
    `config_overrides` of both are merged. A `config_name` in the recipe is looked up in the current folder first, then
    in the recipe's.
    """
    overrides = {}

    def adapt(recipe: dict[str, Any], options: set[str], folder: Path):
        for option in options & _REPLACED_BY.keys():
            for key in _REPLACED_BY[option]:
                recipe.pop(key, None)
        _find_config(recipe, folder)
        stated = recipe.get("config_overrides") or {}
        overrides.update(read_overrides(stated) if isinstance(stated, str) else stated)

    model_args, data_args, training_args = parse_arguments(arguments, _DATACLASSES, adapt)
    model_args.config_overrides = {**overrides, **(model_args.config_overrides or {})}
    return model_args, data_args, training_args


def _option_name(argument: str) -> str:
    return argument.partition("=")[0].lstrip("-").replace("-", "_")


def _find_config(recipe: dict[str, Any], folder: Path):
    """Resolve a recipe's `config_name` to a path that exists."""
    if name := recipe.get("config_name"):
        candidates = (Path(name), folder / name)
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise ValueError(f"config_name={name!r}: there is neither {candidates[0]} nor {candidates[1]}")
        recipe["config_name"] = str(found[0])
