"""The scripts, as functions."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def convert():
    """`main` of scripts/convert.py."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
