import datasets
import pytest


@pytest.fixture(autouse=True)
def data_cache(tmp_path, monkeypatch):
    """No test reads what another one cached."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
