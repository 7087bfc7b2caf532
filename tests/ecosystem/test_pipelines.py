"""`pipeline(…)` on saved folders: what it gives is what the model's own forward says."""

import pytest
import torch
from transformers import pipeline

import shared_bert

from .conftest import TEXTS

BERT_FEATURES = {"attention_scheme": "pairwise"}
GPT_FEATURES = {"attention_scheme": "shared", "attention_bias": True}


def forward(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        return inputs["input_ids"][0].tolist(), model(**inputs)


def test_fill_mask(save):
    model, tokenizer, folder = save(shared_bert.SharedBertForMaskedLM, **BERT_FEATURES)
    guesses = pipeline("fill-mask", model=folder, top_k=3)("the [MASK] hunts .")
    ids, outputs = forward(model, tokenizer, "the [MASK] hunts .")
    scores, tokens = outputs.logits[0, ids.index(tokenizer.mask_token_id)].softmax(-1).topk(3)
    assert [guess["token"] for guess in guesses] == tokens.tolist()
    assert [guess["score"] for guess in guesses] == pytest.approx(scores.tolist(), rel=1e-5)


def test_text_generation(save):
    model, tokenizer, folder = save(shared_bert.SharedGptForCausalLM, **GPT_FEATURES)
    write = pipeline("text-generation", model=folder)
    ((one,), (other,)) = write(TEXTS, batch_size=2, max_new_tokens=8, do_sample=False, return_full_text=False)
    for text, written in zip(TEXTS, (one, other), strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(8):
            with torch.no_grad():
                following = model(ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
        assert written["generated_text"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (shared_bert.SharedBertForSequenceClassification, BERT_FEATURES),
        (shared_bert.SharedGptForSequenceClassification, GPT_FEATURES),
    ],
)
def test_text_classification(save, cls, fields):
    model, tokenizer, folder = save(cls, num_labels=3, **fields)
    found = pipeline("text-classification", model=folder, top_k=None)(TEXTS, batch_size=2)
    for text, labels in zip(TEXTS, found, strict=True):
        expected = forward(model, tokenizer, text)[1].logits[0].softmax(-1)
        got = {label["label"]: label["score"] for label in labels}
        assert [got[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (shared_bert.SharedBertForTokenClassification, BERT_FEATURES),
        (shared_bert.SharedGptForTokenClassification, GPT_FEATURES),
    ],
)
def test_token_classification(save, cls, fields):
    model, tokenizer, folder = save(cls, num_labels=3, **fields)
    found = pipeline("token-classification", model=folder, ignore_labels=[])(TEXTS[0])
    ids, outputs = forward(model, tokenizer, TEXTS[0])
    scores, labels = outputs.logits[0].softmax(-1).max(-1)
    words = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    assert [entity["entity"] for entity in found] == [f"LABEL_{labels[i]}" for i in words]
    assert [entity["score"].item() for entity in found] == pytest.approx(scores[words].tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "fields"), [(shared_bert.SharedBertModel, BERT_FEATURES), (shared_bert.SharedGptModel, GPT_FEATURES)]
)
def test_feature_extraction(save, cls, fields):
    model, tokenizer, folder = save(cls, **fields)
    (features,) = pipeline("feature-extraction", model=folder)(TEXTS[0], return_tensors=True)
    expected = forward(model, tokenizer, TEXTS[0])[1].last_hidden_state[0]
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
