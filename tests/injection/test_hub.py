"""A stock model that shares goes to the Hub with a card that says how to load it."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import shared_bert
from shared_bert.folders import load_sharing_model

from ..hub.conftest import REPO, ROOT, far, hub  # noqa: F401 - fixtures
from ..hub.hub_double import TOKEN

SCRIPT = ROOT / "scripts" / "push_to_hub.py"


@pytest.fixture
def saved(shared, tokenizers, tmp_path):
    shared.save_pretrained(tmp_path / "saved")
    tokenizers["gpt"].save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def pushed_card(hub):  # noqa: F811
    return hub.repositories[REPO].files()["README.md"].decode()


def test_pushed_and_loaded_again(hub, shared, inputs):  # noqa: F811
    expected = shared(**inputs).logits
    shared_bert.hub.push_to_hub(shared, REPO)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(REPO)(**inputs).logits, expected)
    card = pushed_card(hub)
    assert "import shared_bert\nfrom transformers import AutoModelForCausalLM\n" in card
    assert "trust_remote_code" not in card
    assert "loads random matrices in the place of what is shared" in card
    count = int(re.search(r"\| whole model \| ([\d,]+) \|", card)[1].replace(",", ""))
    assert count == shared.num_parameters()
    assert not [name for name in hub.repositories[REPO].files() if name.endswith(".py")]


def test_pushed_as_the_stock_model(hub, shared, inputs):  # noqa: F811
    expected = shared(**inputs).logits
    shared_bert.hub.push_to_hub(shared, REPO, as_stock=True)
    assert "quantization_config" not in json.loads(hub.repositories[REPO].files()["config.json"])
    loaded = AutoModelForCausalLM.from_pretrained(REPO)
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert "import shared_bert" not in pushed_card(hub)
    assert torch.equal(shared(**inputs).logits, expected)  # it still shares


def test_a_saved_one_is_loaded_with_its_class(saved, inputs):
    loaded = load_sharing_model(str(saved))
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.hf_quantizer is not None


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["masa"], indirect=True)
def test_the_script(hub, far, saved):  # noqa: F811
    run = far(SCRIPT, saved, REPO, token=TOKEN)
    assert run.returncode == 0, run.stderr
    assert "tokenizer.json" in hub.repositories[REPO].files()
