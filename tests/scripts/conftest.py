"""Saved models that the scripts are run on, each with a tokenizer."""

import importlib.util
from pathlib import Path

import pytest
from datasets import Dataset

from shared_bert.data import train_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "the fox hunts . the dog barks . the owl sees . the cat naps . the hen lays . the cow stands ."


@pytest.fixture(scope="session")
def tokenizers():
    documents = Dataset.from_dict({"text": [TEXT] * 20})
    kinds = {"bert": "wordpiece", "gpt": "byte_bpe"}
    return {
        name: train_tokenizer(kind, documents, vocab_size=300, model_max_length=40) for name, kind in kinds.items()
    }


@pytest.fixture
def convert():
    """`main` of scripts/convert.py."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "scripts" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
