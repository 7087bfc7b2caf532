"""The built-in corpus `python-docs`: the docstrings of the installed Python libraries.

The files are parsed, never imported: no library's code runs.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Value
from datasets.fingerprint import Hasher

from .arrow_cache import cached_dataset

READER_VERSION = 1  # increase it with every change to what is read: cached corpora are then written again
STANDARD_LIBRARY = "python"
LIBRARIES = {  # import name: name of the distribution
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface-hub",
    "sympy": "sympy",
    "networkx": "networkx",
}
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages"}
MIN_WORDS = 20
MIN_ASCII_SHARE = 0.9


def load_python_docs(num_proc: int | None = None) -> Dataset:
    """Load the docstrings of the standard library and of the well-known libraries that are installed.

    Args:
        num_proc: processes that parse; by default one per CPU core. The corpus is cached until a library's
            version changes.

    Returns:
        One row per docstring of a module, class or function: `text`, cleaned by `inspect.cleandoc`, and
        `label`, a ClassLabel that names the library. The order is fixed. Docstrings of fewer than 20 words,
        those with more than a tenth of non-ASCII characters and exact duplicates are left out.
    """
    versions = _installed_versions()
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(versions))})
    name = f"python-docs-{Hasher.hash([READER_VERSION, *versions.items()])}"
    return cached_dataset(name, features, lambda: _tables(list(versions), num_proc or os.cpu_count()))


def _installed_versions() -> dict[str, str]:
    versions = {STANDARD_LIBRARY: platform.python_version()}
    for library, distribution in LIBRARIES.items():
        if importlib.util.find_spec(library) is not None:
            versions[library] = importlib.metadata.version(distribution)
    return versions


def _tables(libraries: list[str], num_proc: int) -> Iterator[pa.Table]:
    files = [(label, path) for label, library in enumerate(libraries) for path in _python_files(library)]
    labels, paths = zip(*files, strict=True)
    read = Dataset.from_dict({"label": labels, "path": paths}).map(
        _read_batch, batched=True, remove_columns="path", num_proc=num_proc, desc="Reading docstrings"
    )
    first_labels = {}  # the first library keeps a docstring that others repeat
    for text, label in zip(read["text"], read["label"], strict=True):
        first_labels.setdefault(text, label)
    yield pa.table({"text": list(first_labels), "label": list(first_labels.values())})


def _python_files(library: str) -> list[str]:
    if library == STANDARD_LIBRARY:
        roots = [sysconfig.get_path("stdlib")]
    else:
        roots = importlib.util.find_spec(library).submodule_search_locations
    return [
        str(path)
        for root in map(Path, roots)
        for path in sorted(root.rglob("*.py"))
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]


def _read_batch(batch: dict[str, list]) -> dict[str, list]:
    gc.disable()  # a syntax tree is many objects and no garbage: collection would take half of the time
    try:
        rows = [
            (text, label)
            for path, label in zip(batch["path"], batch["label"], strict=True)
            for text in _docstrings(path)
            if _is_english_prose(text)
        ]
    finally:
        gc.enable()
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def _docstrings(path: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(Path(path).read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # templates and files for other versions of Python
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                # Lone surrogates are legal in Python's strings and nowhere else.
                yield inspect.cleandoc(docstring).encode("utf-8", "replace").decode()


def _is_english_prose(text: str) -> bool:
    ascii_characters = len(text.encode("ascii", "ignore"))
    return len(text.split()) >= MIN_WORDS and ascii_characters >= MIN_ASCII_SHARE * len(text)
