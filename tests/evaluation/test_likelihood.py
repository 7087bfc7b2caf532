"""Likelihoods, minimal pairs and perplexity are what their definitions and other libraries give."""

import math

import numpy as np
import pytest
import torch

import shared_bert
from shared_bert.data import MaskedLanguageModelingCollator
from shared_bert.evaluation import blimp_accuracy, document_losses, perplexity, sentence_scores

from ..conftest import tiny_model

SENTENCES = ["the fox hunts .", "the dog", "the owl sees the hen . the cow stands ."]
PAIRS = [
    {"sentence_good": good, "sentence_bad": bad, "UID": uid, "linguistics_term": term}
    for good, bad, uid, term in (
        ("the fox hunts .", "the fox dog .", "a", "x"),
        ("the owl sees", "owl the sees", "a", "x"),
        ("the cat naps .", "the cat cat .", "b", "x"),
        ("the hen lays .", "hen lays the .", "c", "y"),
    )
]


@pytest.fixture
def models(tokenizers):
    def models(kind, **fields):
        tokenizer = tokenizers[kind]
        ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return tiny_model(kind, vocab_size=320, initializer_range=0.3, **ids, **fields), tokenizer

    return models


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_a_decoders_score_is_the_sum_of_its_log_probabilities(models):
    model, tokenizer = models("gpt", attention_scheme="shared")
    for candidate in (model, shared_bert.to_stock(model)):
        for sentence, found in zip(
            SENTENCES, sentence_scores(candidate, tokenizer, SENTENCES, batch_size=2), strict=True
        ):
            ids = [tokenizer.eos_token_id, *tokenizer(" " + sentence)["input_ids"]]
            scores = log_probabilities(model, ids)
            assert found == pytest.approx(sum(scores[i, ids[i + 1]].item() for i in range(len(ids) - 1)), rel=1e-4)


@pytest.mark.parametrize("within_word", [False, True])
def test_an_encoders_score_masks_one_token_at_a_time(models, within_word):
    model, tokenizer = models("bert", attention_scheme="pairwise")
    sentences = [*SENTENCES, "foxdog hunts"]  # of several pieces
    assert len(tokenizer("foxdog")["input_ids"]) > 3
    for candidate in (model, shared_bert.to_stock(model)):
        found = sentence_scores(candidate, tokenizer, sentences, within_word, batch_size=3)
        for sentence, score in zip(sentences, found, strict=True):
            encoded = tokenizer(sentence)
            expected = 0
            for place in range(1, len(encoded["input_ids"]) - 1):
                ids = list(encoded["input_ids"])
                of_word = [i for i, word in enumerate(encoded.word_ids()) if word == encoded.word_ids()[place]]
                for i in of_word:
                    if i == place or (within_word and i > place):
                        ids[i] = tokenizer.mask_token_id
                expected += log_probabilities(model, ids)[place, encoded["input_ids"][place]].item()
            assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_accuracy_by_phenomenon(models, kind):
    model, tokenizer = models(kind)
    right = [
        sentence_scores(model, tokenizer, [pair["sentence_good"]])
        > sentence_scores(model, tokenizer, [pair["sentence_bad"]])
        for pair in PAIRS
    ]
    found = blimp_accuracy(model, tokenizer, PAIRS)
    assert found["overall"] == {"accuracy": sum(right) / 4, "pairs": 4}
    assert found["by_phenomenon"] == {"x": sum(right[:3]) / 3, "y": float(right[3])}
    assert found["by_paradigm"] == {"a": sum(right[:2]) / 2, "b": float(right[2]), "c": float(right[3])}


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_two_equal_sentences_count_as_right(models, kind):
    pair = {"sentence_good": "the fox hunts", "sentence_bad": "the fox hunts", "UID": "a"}
    assert blimp_accuracy(*models(kind), [pair])["overall"]["accuracy"] == 1  # as lm-eval has it


def test_text_without_spaces_is_one_long_word(models):
    found = perplexity(*models("gpt"), ["the" * 400])
    assert found["words"] == 1
    assert found["per_word"] == math.inf
    assert math.isfinite(found["per_token"])


def test_lm_eval_gives_a_decoder_the_same_numbers(models):
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = models("gpt", attention_scheme="query_free")
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    sentences = [pair[column] for pair in PAIRS for column in ("sentence_good", "sentence_bad")]
    requests = [Instance("loglikelihood", {}, ("", f" {sentence}"), 0) for sentence in sentences]
    expected = [score for score, _ in scorer.loglikelihood(requests, disable_tqdm=True)]
    assert sentence_scores(model, tokenizer, sentences) == pytest.approx(expected, rel=1e-4)

    texts = [" ".join(SENTENCES * 6), "the fox"]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    rolled = scorer.loglikelihood_rolling(requests, disable_tqdm=True)
    window = model.config.max_position_embeddings
    found = perplexity(model, tokenizer, texts, stride=window, window=window)
    assert found["tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert found["tokens"] > 2 * window
    assert found["nats_per_token"] == pytest.approx(-sum(rolled) / found["tokens"], rel=1e-4)


@pytest.mark.parametrize(("stride", "window"), [(1, 8), (3, 8), (8, 8), (5, 20), (40, 40)])
def test_every_token_is_predicted_once_from_its_window(models, stride, window):
    model, tokenizer = models("gpt")
    text = " ".join(SENTENCES)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    total, place = 0.0, 1
    while place < len(ids):
        last = min(place + (window if place == 1 else stride), len(ids))
        context = ids[max(last - 1 - window, 0) : last]
        scores = log_probabilities(model, context[:-1])
        total -= sum(scores[i - 1, context[i]].item() for i in range(len(context) - (last - place), len(context)))
        place = last
    found = perplexity(model, tokenizer, [text], window, stride)
    assert found["nats_per_token"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert found["per_token"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert found["per_word"] == pytest.approx(math.exp(total / len(text.split())), rel=1e-4)
    assert (found["tokens"], found["words"]) == (len(ids) - 1, len(text.split()))


def test_a_decoders_documents_add_up_to_its_perplexity(models):
    model, tokenizer = models("gpt")
    found = document_losses(model, tokenizer, SENTENCES, window=8, stride=3, batch_size=2)
    for i, sentence in enumerate(SENTENCES):
        alone = perplexity(model, tokenizer, [sentence], stride=3, window=8)
        assert found.tokens[i] == alone["tokens"]
        assert found.nats[i] == pytest.approx(alone["tokens"] * alone["nats_per_token"], rel=1e-4)
    assert found.mean == pytest.approx(perplexity(model, tokenizer, SENTENCES, 8, 3)["nats_per_token"], rel=1e-4)


def test_an_encoders_documents_are_masked_by_themselves(models):
    model, tokenizer = models("bert", attention_scheme="pairwise")
    texts = [" ".join(SENTENCES), "the fox", ""]
    for candidate in (model, shared_bert.to_stock(model)):
        found = document_losses(candidate, tokenizer, texts, window=10, mlm_probability=0.5, seed=3, batch_size=2)
        collator = MaskedLanguageModelingCollator(tokenizer, 0.5, seed=3)
        for index, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            nats, tokens = 0.0, 0
            for start in range(0, len(ids), 8):
                row = np.array([tokenizer.cls_token_id, *ids[start : start + 8], tokenizer.sep_token_id])
                row = {"input_ids": row, "document_ids": 0 * row, "index": index, "epoch": start}
                batch = collator([row])
                scores = log_probabilities(model, batch["input_ids"][0].tolist())
                for place, label in enumerate(batch["labels"][0].tolist()):
                    if label != -100:
                        nats, tokens = nats - scores[place, label].item(), tokens + 1
            assert found.tokens[index] == tokens
            assert found.nats[index] == pytest.approx(nats, rel=1e-4)
    assert len(tokenizer(texts[0])["input_ids"]) > 10  # more than one row
    assert found.tokens[2] == 0
    assert found.mean == pytest.approx(sum(found.nats) / sum(found.tokens))


def test_more_context_is_not_worse_for_a_model_that_uses_it(models):
    model, tokenizer = models("gpt")
    whole = perplexity(model, tokenizer, [SENTENCES[2]])
    ids = [tokenizer.eos_token_id, *tokenizer(SENTENCES[2])["input_ids"]]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert whole["nats_per_token"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("gpt", lambda m, t: sentence_scores(m, t, ["a"], within_word=True), "within_word is for encoders"),
        ("bert", lambda m, t: perplexity(m, t, ["a"]), "perplexity is for decoders"),
        (
            "gpt",
            lambda m, t: perplexity(m, t, ["the fox"], stride=9, window=8),
            "stride=9 and window=8 must be in order",
        ),
        ("gpt", lambda m, t: perplexity(m, t, [""]), "the texts have no tokens"),
        ("bert", lambda m, t: document_losses(m, t, ["", ""]), "the texts have no tokens"),
        (
            "bert",
            lambda m, t: sentence_scores(m, t, ["the fox " * 40]),
            "a sentence has .* tokens, more than 40 positions",
        ),
        ("bert", lambda m, t: blimp_accuracy(m, t, []), "there are no pairs"),
        ("gpt", lambda m, t: blimp_accuracy(m, t, [{"good": "a"}]), "no column UID, sentence_bad, sentence_good"),
        ("bert", lambda m, t: sentence_scores(m.base_model, t, ["a"]), "SharedBertModel is no language model"),
    ],
)
def test_what_cannot_be_scored_is_refused(models, kind, call, message):
    with pytest.raises(ValueError, match=message):
        call(*models(kind))
