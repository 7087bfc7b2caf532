"""Language models of any architecture are judged: the likelihood of sentences, and perplexity."""

import pytest
import torch

import shared_bert
from shared_bert.evaluation import perplexity, sentence_scores

from .architectures import ARCHITECTURES

SENTENCES = ["the fox hunts .", "the owl sees the dog ."]


@pytest.mark.parametrize("shares", [False, True])
def test_decoders(tokenizers, shares):
    model, tokenizer = ARCHITECTURES["llama"].model(vocab_size=320), tokenizers["gpt"]
    if shares:
        model, _ = shared_bert.share(model, depth_sharing="masa", num_atoms=2)
    expected = []
    for sentence in SENTENCES:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(f" {sentence}")["input_ids"]]])
        predictions = model(ids).logits[0, :-1].double().log_softmax(-1)
        expected.append(float(predictions.gather(1, ids[0, 1:, None]).sum()))
    assert sentence_scores(model, tokenizer, SENTENCES) == pytest.approx(expected, rel=1e-4)
    found = perplexity(model, tokenizer, [f" {SENTENCES[0]}"])
    assert found["nats_per_token"] * found["tokens"] == pytest.approx(-expected[0], rel=1e-4)


def test_encoders(tokenizers):
    model, tokenizer = ARCHITECTURES["modernbert"].model(vocab_size=320), tokenizers["bert"]
    expected = []
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        total = 0.0
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            total += float(model(masked).logits[0, place].double().log_softmax(-1)[ids[0, place]])
        expected.append(total)
    assert sentence_scores(model, tokenizer, SENTENCES) == pytest.approx(expected, rel=1e-4)


def test_what_is_no_language_model(tokenizers):
    with pytest.raises(ValueError, match="ViTForImageClassification is no language model"):
        sentence_scores(ARCHITECTURES["vit"].model(), tokenizers["bert"], SENTENCES)
