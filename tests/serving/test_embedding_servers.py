"""infinity answers the embeddings of sentence-transformers, from the export of a conversion.

infinity-emb 0.0.78 pins transformers below 5, so it has an environment of its own, whose Python INFINITY names:
`python3 -m venv infinity; infinity/bin/pip install torch==2.13.0 "infinity-emb[server,torch]"`.
"""

import json
import os
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer

import shared_bert

from ..ecosystem.conftest import TEXTS, random_model

PYTHON = os.environ.get("INFINITY")
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
OPTIONS = ["--engine", "torch", "--device", "cpu", "--no-model-warmup"]
sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="INFINITY names no Python with infinity. " + __doc__.partition("\n\n")[2])
@pytest.mark.parametrize("fields", [{"attention_scheme": "shared_kv"}, {"depth_sharing": "masa", "num_atoms": 1}])
def test_infinity(serve, fields, tokenizers, tmp_path, monkeypatch):
    tokenizer = tokenizers["bert"]
    model = random_model("bert", shared_bert.SharedBertModel, vocab_size=len(tokenizer), **fields)
    folder = str(tmp_path / "model")
    shared_bert.to_stock(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    url = serve([PYTHON, "-m", "infinity_emb.cli", "v2", "--model-id", folder, *OPTIONS, "--served-model-name", "own"])
    body = json.dumps({"model": "own", "input": TEXTS}).encode()
    request = urllib.request.Request(f"{url}/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        got = torch.tensor([row["embedding"] for row in json.load(answer)["data"]])

    encoder = sentence_transformers.SentenceTransformer(folder, device="cpu")
    expected = encoder.encode(TEXTS, normalize_embeddings=True, convert_to_tensor=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # The model of this package, padding aside.
    inputs = [AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt") for text in TEXTS]
    with torch.no_grad():
        own = torch.stack([model(**row).last_hidden_state[0].mean(0) for row in inputs])
    torch.testing.assert_close(got, torch.nn.functional.normalize(own, dim=-1), rtol=1e-4, atol=1e-5)
