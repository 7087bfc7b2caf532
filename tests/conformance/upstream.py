"""Transformers' own test mixins, which no wheel carries, brought to this machine by the first test that wants them.

They come from the installed version's tag, or, where its git repository cannot be reached, from its source
distribution, which has the common tests of models and configs but not those of generation, export and pipelines.
What came stays in the user's cache (`CACHE`): delete the folder to have it brought anew.
"""

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import transformers

import tests

REPOSITORY = "https://github.com/huggingface/transformers"
FOLDERS = ("tests/exporters", "tests/generation", "tests/pipelines", "tests/utils", "utils")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "shared_bert"


def _run(*command: str):
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)


def _clone(into: Path):
    """Brings the files that lie right in `tests`, and `FOLDERS`."""
    options = ("--quiet", "--depth=1", "--filter=blob:none", "--sparse")
    _run("git", "clone", *options, f"--branch=v{transformers.__version__}", REPOSITORY, str(into))
    _run("git", "-C", str(into), "sparse-checkout", "set", *FOLDERS)


def _download(into: Path):
    """Brings `tests` as the source distribution has it."""
    options = ("--quiet", "--no-deps", "--no-binary=transformers", "--retries=1", f"--dest={into.parent}")
    _run(sys.executable, "-m", "pip", "download", *options, f"transformers=={transformers.__version__}")
    (archive,) = into.parent.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar:
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/"):
                tar.extract(member, into, filter="data")


WAYS = {"git": _clone, "pip": _download}


def fetch() -> Path:
    """Gives the folder that holds `tests` of the installed transformers.

    Raises:
        OSError: saying what was tried, where nothing could be had.
    """
    folder = CACHE / f"transformers-{transformers.__version__}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    failures = []
    for way, bring in WAYS.items():
        # A half-brought folder never has the final name, and of two processes the first one's is kept.
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            try:
                bring(Path(scratch) / "source")
            except (OSError, subprocess.SubprocessError) as error:
                failures.append(f"{way}: {(getattr(error, 'stderr', None) or str(error)).strip()}")
                continue
            with contextlib.suppress(OSError):
                (Path(scratch) / "source").rename(folder)
            return folder
    raise OSError(f"no tests of transformers {transformers.__version__}: " + "; ".join(failures))


@functools.cache
def upstream_folder() -> Path:
    """Makes transformers' tests importable as `tests.…`, the name that they call one another by.

    Skips the module that asks where they cannot be had.
    """
    try:
        folder = fetch() / "tests"
    except OSError as error:
        pytest.skip(str(error), allow_module_level=True)
    tests.__path__.append(str(folder))
    sys.path.append(str(folder.parent))  # for `utils`
    if not (folder / "generation").exists():
        _stand_in("exporters.test_export", ExportTesterMixin=object)
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("utils.test_configuration_utils", config_common_kwargs={"output_hidden_states": True})
    return folder


def _stand_in(name: str, **contents):
    module = types.ModuleType(f"tests.{name}")
    vars(module).update(contents)
    sys.modules[module.__name__] = module


def upstream(name: str) -> types.ModuleType:
    """Imports a module of transformers' tests, and skips the importing one where it is not to be had.

    Some of them import transformers from the source folder beside them; here it is the installed one. Their pytest
    marks are of no use here.
    """
    upstream_folder()
    with patch("transformers.utils.direct_transformers_import", lambda path: transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)
        return importlib.import_module(f"tests.{name}")
