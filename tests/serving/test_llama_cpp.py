"""llama.cpp runs what `to_stock` exports: it writes what `generate` writes, and embeds as the model does.

LLAMA_CPP names a folder with llama-cpp-python and its source, whose converter is used: the commands are in
shared_bert/serving/README.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shared_bert

from ..conftest import TEXT
from ..ecosystem.conftest import random_model

FOLDER = Path(os.environ.get("LLAMA_CPP", "")).resolve()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder: see shared_bert/serving/README.md"
    ),
]

# The converter knows pre-tokenizers by what they make of one text with a known vocabulary, so none that was trained.
CONVERT = """
import runpy
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
ANSWER = """
import json, sys
from llama_cpp import Llama

texts, options = json.loads(sys.argv[1])
llama, answers = Llama(n_threads=1, verbose=False, **options), []
for text in texts:
    answers.append({"input_ids": llama.tokenize(text.encode())})
    if "embedding" in options:
        answers[-1]["embedding"] = llama.embed(text)
        continue
    llama.reset()
    llama.eval(answers[-1]["input_ids"])
    for _ in range(8):
        llama.eval([int(llama.scores[llama.n_tokens - 1].argmax())])
    answers[-1]["tokens"] = llama.input_ids[: llama.n_tokens].tolist()
    answers[-1]["logits"] = llama.scores[: llama.n_tokens].tolist()
print(json.dumps(answers))
"""
MEAN, CLS = 1, 2
TOLERANCE = 0.01  # it computes GELU by a table in float16, of the tanh formula
SCHEMES = [
    {"attention_scheme": "shared"},
    {"attention_scheme": "query_free"},
    {"attention_scheme": "standard", "depth_sharing": "masa", "num_atoms": 1},
]
TEXTS = ["the fox hunts . the dog", "The cat's 3 hens!\n\n lay", TEXT[:40]]


def exported(cls, tokenizer, folder, **fields):
    """Return a model, and the file that the converter makes of its export."""
    kind = "gpt" if cls is shared_bert.SharedGptForCausalLM else "bert"
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    model = random_model(kind, cls, vocab_size=len(tokenizer), **special, **fields)
    stock = shared_bert.to_stock(model)
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.gguf"
    converter = [sys.executable, "-c", CONVERT, folder, "--outfile", file, "--outtype", "f32"]
    subprocess.run(converter, cwd=FOLDER / "vendor" / "llama.cpp", check=True)
    return model, str(file)


def answers(**options) -> list[dict]:
    """What llama.cpp makes of each text."""
    command = [FOLDER / "venv" / "bin" / "python", "-c", ANSWER, json.dumps([TEXTS, options])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("fields", SCHEMES)
def test_it_writes_what_generate_writes(fields, tokenizers, tmp_path):
    # Four times the hidden size, which the converter takes for granted.
    fields = {"intermediate_size": 128, "initializer_range": 0.3, **fields}
    tokenizer = tokenizers["gpt"]
    model, file = exported(shared_bert.SharedGptForCausalLM, tokenizer, tmp_path, **fields)
    for text, answer in zip(TEXTS, answers(model_path=file, n_ctx=40, logits_all=True), strict=True):
        assert answer["input_ids"] == tokenizer(text)["input_ids"]
        prompt = torch.tensor([answer["input_ids"]])
        expected = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)
        assert answer["tokens"] == expected[0].tolist()
        with torch.no_grad():
            logits = model(expected).logits[0]
        torch.testing.assert_close(torch.tensor(answer["logits"]), logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("fields", SCHEMES)
def test_it_embeds_as_the_model_does(fields, tokenizers, tmp_path):
    tokenizer = tokenizers["bert"]
    model, file = exported(shared_bert.SharedBertModel, tokenizer, tmp_path, **fields)
    for pooling in (MEAN, CLS):
        options = {"model_path": file, "n_ctx": 40, "embedding": True, "pooling_type": pooling}
        for text, answer in zip(TEXTS, answers(**options), strict=True):
            inputs = tokenizer(text, return_tensors="pt")
            assert answer["input_ids"] == inputs["input_ids"][0].tolist()
            with torch.no_grad():
                hidden_states = model(**inputs).last_hidden_state[0]
            expected = hidden_states.mean(0) if pooling == MEAN else hidden_states[0]
            torch.testing.assert_close(torch.tensor(answer["embedding"]), expected, rtol=0, atol=TOLERANCE)
