"""`shared-bert-serve` answers what `generate` writes, whole and streamed, with continuous batching and without."""

import sys

import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..ecosystem.conftest import random_model

PROMPT = "the fox hunts . the"
COMMAND = [sys.executable, "-m", "shared_bert.serving.transformers_serve"]
# Else the cache is sized for a machine that does nothing else.
SMALL_CACHE = ["--cb-num-blocks", "64", "--cb-block-size", "16", "--cb-max-batch-tokens", "64"]


def saved(kind: str, tokenizers, folder):
    """Return a folder with a decoder, with depth sharing or without, and its tokenizer."""
    sharing = {"depth_sharing": "masa", "num_atoms": 2} if kind == "masa" else {}
    tokenizer = tokenizers["bert"]  # whose tokens are text, where a byte need not be
    special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": None}
    fields = {"attention_scheme": "shared", "vocab_size": len(tokenizer), "initializer_range": 0.3}
    model = random_model("gpt", **special, **fields, **sharing)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    without_token_types = {"model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = AutoTokenizer.from_pretrained(folder, **without_token_types)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def written(folder, is_chat: bool, max_new_tokens: int = 8) -> str:
    """What `generate` writes after the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=not is_chat)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "batching"), [("shared", False), ("shared", True), ("masa", True)])
def test_it_answers_what_generate_writes(serve, tokenizers, tmp_path, kind, batching):
    folder = saved(kind, tokenizers, tmp_path / "model")
    options = ["--continuous-batching", *SMALL_CACHE] if batching else []
    url = serve([*COMMAND, folder, "--device", "cpu", *options])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    settings = {"model": str(folder), "temperature": 0}
    expected = written(folder, is_chat=False)
    assert len(expected.split()) > 2
    request = {**settings, "prompt": PROMPT, "max_tokens": 8}
    assert client.completions.create(**request).choices[0].text == expected
    parts = [part.choices[0].text for part in client.completions.create(**request, stream=True) if part.choices]
    assert sum(part != "" for part in parts) > 1
    assert "".join(parts) == expected
    del request["max_tokens"]  # the text ends at the last position
    for _ in range(2):
        assert client.completions.create(**request).choices[0].text == written(folder, False, max_new_tokens=60)

    chat = {**settings, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    answer = client.chat.completions.create(**chat).choices[0].message.content
    assert answer == written(folder, is_chat=True)
