"""A model that has been saved, and a Hub on this machine to push it to."""

import json
import os
import subprocess
from pathlib import Path

import huggingface_hub.constants
import pytest
import transformers.utils.hub

from ..conftest import tiny_model
from ..processes import run_python
from .hub_double import TOKEN, HubDouble

ROOT = Path(__file__).parents[2]
REPO = "somebody/model"
CLASSES = {"bert": ("AutoModelForMaskedLM", "BertTokenizer"), "gpt": ("AutoModelForCausalLM", "GPT2Tokenizer")}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubDouble() as double:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", double.url)
        template = double.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield double


@pytest.fixture
def far(hub, tmp_path):
    """Runs a Python command in a process that knows this Hub; `token` decides whether it is logged in."""

    def far(*command, token: str | None = None, **environment) -> subprocess.CompletedProcess:
        known = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        clean = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        token_variable = {} if token is None else {"HF_TOKEN": token}
        environment = {**clean, **known, **token_variable, **environment}
        return run_python(*command, environment=environment, cwd=tmp_path)

    return far


@pytest.fixture
def saved(tokenizers, tmp_path):
    """Saves a model and its tokenizer; gives the model and the folder."""

    def saved(kind="bert", cls=None, name="saved", **fields):
        model = tiny_model(kind, cls, vocab_size=320, **fields)
        model.save_pretrained(tmp_path / name)
        tokenizers[kind].save_pretrained(tmp_path / name)
        (tmp_path / name / "eval_results.json").write_text(json.dumps({"eval_loss": 2.5, "eval_accuracy": 0.25}))
        return model, tmp_path / name

    return saved
