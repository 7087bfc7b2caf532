import random

import datasets
import pytest
from datasets import Dataset

from shared_bert.data import train_tokenizer

VOCABULARY = """
the a cat dog house tree river mountain walks walked walking sleeps sleeping under over near old young green
quickly slowly attention shares matrices model learns learning language unbelievable
"""
WORDS = VOCABULARY.split()


def sentences(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) + "." for _ in range(count)]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Every test starts with an empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="session")
def corpus():
    return Dataset.from_dict({"text": sentences(200)})


@pytest.fixture(scope="session")
def bert(corpus):
    return train_tokenizer("wordpiece", corpus, vocab_size=120, model_max_length=32)


@pytest.fixture(scope="session")
def gpt(corpus):
    return train_tokenizer("byte_bpe", corpus, vocab_size=320, model_max_length=32)
