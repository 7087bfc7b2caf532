"""A stock model that shares goes to the Hub with a card that says how to load it."""

import json
import re
import runpy

import pytest
import torch
from transformers import AutoModelForCausalLM

import shared_bert
from shared_bert.folders import load_sharing_model

from ..hub.conftest import REPO, ROOT, far, hub  # noqa: F401 - fixtures
from ..hub.hub_double import TOKEN
from ..training.runs import write_text
from .architectures import ARCHITECTURES

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


@pytest.mark.parametrize(
    "options",
    [
        ["--depth_sharing", "masa", "--num_atoms", "2", "--depth_shared_matrices", "qkvo"],
        ["--attention_scheme", "shared_kv"],
        ["--depth_sharing", "low_rank", "--rank", "4", "--targets", "gate_proj,up_proj"],
    ],
    ids=["masa", "shared_kv", "mlp"],
)
def test_converted_healed_and_multiplied_out_by_the_script(llama, tokenizers, tmp_path, capsys, options):
    convert = runpy.run_path(str(ROOT / "scripts" / "convert.py"))["main"]
    model = ARCHITECTURES["llama"].model(num_key_value_heads=4, vocab_size=320)
    model.save_pretrained(tmp_path / "llama")
    tokenizers["gpt"].save_pretrained(tmp_path / "llama")
    text = write_text(tmp_path / "text.txt")
    reading = ["--calibration", text, "--calibration_tokens", 500, "--block_size", 32, "--sample_by", "line"]
    healing = ["--heal", "--train_file", text, "--max_steps", 3, "--use_cpu", "true", "--disable_tqdm", "true"]
    arguments = ["from-stock", tmp_path / "llama", tmp_path / "healed", *options, *reading, *healing]
    assert convert(list(map(str, arguments))) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "healed" / "converted" / "conversion.json").read_text())["report"]["total_after"]
    healed = load_sharing_model(str(tmp_path / "healed"))
    assert healed.num_parameters() < model.num_parameters()
    assert "Converted from a trained model" in str(
        shared_bert.hub.model_card(type(healed), healed.config, REPO, tmp_path / "healed")
    )
    assert convert(["to-stock", str(tmp_path / "healed"), str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    input_ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(plain(input_ids).logits, healed(input_ids).logits, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "plain" / "tokenizer.json").is_file()
