"""Sentence embeddings by sentence-transformers, from a folder that our own model saved."""

import pytest
import torch

import shared_bert

from .conftest import TEXTS

sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs the package sentence-transformers")


def test_mean_pooling_and_a_second_load(save, attention, tmp_path):
    model, tokenizer, folder = save(shared_bert.SharedBertModel, **attention)
    encoder = sentence_transformers.SentenceTransformer(folder, device="cpu")
    embeddings = encoder.encode(TEXTS, convert_to_tensor=True)

    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None]
    with torch.no_grad():
        expected = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)

    encoder.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert isinstance(again[0].auto_model, shared_bert.SharedBertModel)
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), embeddings)
