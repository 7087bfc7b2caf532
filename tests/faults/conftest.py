import datasets
import pytest

import shared_bert

from ..conftest import tiny_model


@pytest.fixture(autouse=True)
def data_cache(tmp_path, monkeypatch):
    """No test reads what another one cached."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def places(tmp_path):
    return {"log": tmp_path / "log.txt", "cache": tmp_path / "cache"}


@pytest.fixture
def stock(tmp_path, tokenizers):
    model = tiny_model("bert", attention_scheme="standard", vocab_size=320, initializer_range=0.15)
    shared_bert.to_stock(model).save_pretrained(tmp_path / "stock")
    tokenizers["bert"].save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "1_Pooling").mkdir()
    (tmp_path / "stock" / "1_Pooling" / "config.json").write_text("{}")
    return tmp_path / "stock"
