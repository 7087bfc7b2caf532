"""What `to-stock` writes serves where this package is not: pipelines, sentence-transformers and ONNX."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import shared_bert

from ..conftest import tiny_model
from ..far_side import WITHOUT_PACKAGE
from ..processes import run_python

FOLDER = "import json\nfolder = sys.argv[1]\n"
TEXTS = ["the fox hunts .", "the dog barks . the owl sees ."]


def far_side(code: str, *arguments):
    """Runs `code` where the package is not, and gives the JSON that it prints last."""
    process = run_python("-c", WITHOUT_PACKAGE + FOLDER + code, *arguments)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def export(convert, tokenizers, tmp_path):
    """Gives a model of this package in which all parameters matter, and the folder of its stock counterpart."""

    def export(cls, **fields):
        kind = "bert" if cls.config_class is shared_bert.SharedBertConfig else "gpt"
        model = tiny_model(kind, cls, vocab_size=320, **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "ours")
        tokenizers[kind].save_pretrained(tmp_path / "ours")
        assert convert(["to-stock", str(tmp_path / "ours"), str(tmp_path / "stock")]) == 0
        return model, tmp_path / "stock"

    return export


def test_fill_mask(export):
    model, folder = export(shared_bert.SharedBertForMaskedLM, attention_scheme="pairwise")
    guesses = far_side(
        """
from transformers import AutoModel, pipeline
assert type(AutoModel.from_pretrained(folder)).__name__ == "BertModel"
print(json.dumps(pipeline("fill-mask", model=folder, top_k=3)("the [MASK] hunts .")))
""",
        folder,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the [MASK] hunts .", return_tensors="pt")
    masked = model(**inputs).logits[0, inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)]
    scores, tokens = masked.softmax(-1).topk(3)
    assert [guess["token"] for guess in guesses] == tokens.tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(scores.tolist(), rel=1e-5)


def test_text_generation(export):
    model, folder = export(shared_bert.SharedGptForCausalLM, attention_scheme="unified")
    written = far_side(
        """
from transformers import AutoModel, pipeline
assert type(AutoModel.from_pretrained(folder)).__name__ == "GPT2Model"
write = pipeline("text-generation", model=folder)
(written,) = write("the fox", max_new_tokens=8, do_sample=False, return_tensors=True)
print(json.dumps(written["generated_token_ids"]))
""",
        folder,
    )
    inputs = AutoTokenizer.from_pretrained(folder)("the fox", return_tensors="pt")
    assert written == model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()


def test_sentence_transformers(export):
    fields = {"depth_sharing": "masa", "num_atoms": 1, "coefficient_source": "network"}
    model, folder = export(shared_bert.SharedBertModel, attention_scheme="standard", **fields)
    embeddings = far_side(
        """
from sentence_transformers import SentenceTransformer
print(json.dumps(SentenceTransformer(folder, device="cpu").encode(json.loads(sys.argv[2])).tolist()))
""",
        folder,
        json.dumps(TEXTS),
    )
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    expected = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(torch.tensor(embeddings), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (shared_bert.SharedBertForSequenceClassification, {"attention_scheme": "shared"}),
        (shared_bert.SharedGptForCausalLM, {"attention_scheme": "shared_kv", "num_key_value_heads": 2}),
    ],
)
def test_onnx(export, cls, fields):
    model, folder = export(cls, **fields)
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = far_side(
        """
import numpy as np, onnxruntime, torch, transformers
(architecture,) = transformers.AutoConfig.from_pretrained(folder).architectures
model = getattr(transformers, architecture).from_pretrained(folder)
model.config.use_cache = False
example = {"input_ids": torch.ones(3, 7, dtype=torch.long), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=40)}
torch.onnx.export(
    model, (), folder + "/model.onnx", kwargs=example, dynamo=True, input_names=list(example),
    output_names=["logits"], dynamic_shapes={name: axes for name in example}, verbose=False,
)
session = onnxruntime.InferenceSession(folder + "/model.onnx")
inputs = {name: np.array(rows) for name, rows in json.loads(sys.argv[2]).items()}
print(json.dumps(session.run(["logits"], inputs)[0].tolist()))
""",
        folder,
        json.dumps({name: tensor.tolist() for name, tensor in inputs.items()}),
    )
    torch.testing.assert_close(torch.tensor(logits), model(**inputs).logits, rtol=1e-4, atol=1e-4)
