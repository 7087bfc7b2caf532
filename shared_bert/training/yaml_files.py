"""YAML and JSON files of keys and values, and the check for unknown keys."""

import difflib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-4, which has no dot, as a string; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(text: str) -> Any:
    """Read YAML, and so JSON, from a string."""
    return yaml.load(text, _Loader)


def load_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        ValueError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, not {type(content).__name__}")
    return content


def check_keys(given: Iterable[str], valid: Collection[str], where: str):
    """Raise a ValueError for a key that is not valid.

    Raises:
        ValueError: naming the key, its place and the nearest valid key.
    """
    for key in given:
        if key not in valid:
            (nearest,) = difflib.get_close_matches(str(key), valid, n=1, cutoff=0)
            raise ValueError(f"{where}: unknown key {key!r}; the nearest valid one is {nearest!r}")
