"""How likely a text is to a language model: sentences, minimal pairs (BLiMP), and perplexity."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ..conversion.families import FAMILIES, family_of
from ..data import MaskedLanguageModelingCollator
from ..modeling.losses import IGNORED

# Models of this package, and their stock counterparts.
_WITH_A_FAMILY = {
    kind for family in FAMILIES.values() for kind in (family.config.model_type, family.stock_config.model_type)
}


def objective_of(model: PreTrainedModel) -> str:
    """Return what a language model of any architecture predicts: "mlm" (masked tokens) or "clm" (the next token).

    Raises:
        ValueError: it is no language model.
    """
    for objective, names in (("mlm", MODEL_FOR_MASKED_LM_MAPPING_NAMES), ("clm", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        if names.get(model.config.model_type) == type(model).__name__:
            return objective
    if model.config.model_type in FAMILIES and model.get_output_embeddings() is not None:
        return family_of(model.config).objective
    raise ValueError(f"a {type(model).__name__} is no language model: it has no head over the vocabulary")


def sentence_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    within_word: bool = False,
    batch_size: int = 128,
) -> list[float]:
    """Return the log-likelihood in nats of each sentence under a decoder, its pseudo-log-likelihood under an encoder.

    A decoder's is that of the tokens after the tokenizer's BOS or EOS token; as in lm-eval, a space comes first. An
    encoder's is the sum over the tokens of their log-probability where they are masked, one at a time (Salazar et al.,
    arXiv 1910.14659).

    Args:
        model: a language model of this package or of transformers, in eval mode.
        within_word: mask the later tokens of a token's word as well (Kauf & Ivanova, arXiv 2305.10588); for encoders.
        batch_size: rows of one forward; an encoder takes a row for every token.

    Raises:
        ValueError: a model without a head over the vocabulary, `within_word` with a decoder, or a sentence that is
            longer than the model's positions.
    """
    if objective_of(model) == "clm":
        if within_word:
            raise ValueError("within_word is for encoders: a decoder sees no later token")
        rows = [_decoder_row(tokenizer, sentence, i) for i, sentence in enumerate(sentences)]
    else:
        rows = [
            row for i, sentence in enumerate(sentences) for row in _encoder_rows(tokenizer, sentence, within_word, i)
        ]
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if longest > most:
        raise ValueError(f"a sentence has {longest} tokens, more than {most} positions")
    return _text_scores(model, rows, len(sentences), batch_size, tokenizer.pad_token_id or 0)


def _text_scores(
    model: PreTrainedModel, rows: list[dict[str, Any]], num_texts: int, batch_size: int, pad_token_id: int
) -> list[float]:
    """Return for each text the sum of the log-probabilities of the labels in its rows."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # similar lengths need little padding
    scores = [0.0] * num_texts
    for start in range(0, len(order), batch_size):
        batch = [rows[i] for i in order[start : start + batch_size]]
        for row, total in zip(batch, _row_scores(model, batch, pad_token_id), strict=True):
            scores[row["text"]] += total
    return scores


def _decoder_row(tokenizer: PreTrainedTokenizerBase, sentence: str, index: int) -> dict[str, Any]:
    ids = tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"]
    return {"input_ids": [start_token(tokenizer), *ids[:-1]], "labels": ids, "text": index}


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token before a text: BOS, else EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(f"{type(tokenizer).__name__} has neither bos_token nor eos_token, which a text starts after")


def _encoder_rows(
    tokenizer: PreTrainedTokenizerBase, sentence: str, within_word: bool, index: int
) -> Iterator[dict[str, Any]]:
    encoded = tokenizer(sentence)
    ids, words = encoded["input_ids"], encoded.word_ids()
    for place, word in enumerate(words):
        if word is None:  # a special token
            continue
        masked, labels = list(ids), [IGNORED] * len(ids)
        labels[place] = ids[place]
        for later in range(place, len(ids) if within_word else place + 1):
            if words[later] == word:
                masked[later] = tokenizer.mask_token_id
        yield {"input_ids": masked, "labels": labels, "text": index}


@torch.no_grad()
def _row_scores(model: PreTrainedModel, rows: list[dict[str, Any]], pad_token_id: int) -> list[float]:
    """Return the sum of the log-probabilities of each row's labels; a label is predicted at its own place."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(column: str, filling: int) -> torch.Tensor:
        return torch.tensor(
            [row[column] + [filling] * (length - len(row[column])) for row in rows], device=model.device
        )

    labels = padded("labels", IGNORED)
    is_text = torch.tensor(
        [[1] * len(r["labels"]) + [0] * (length - len(r["labels"])) for r in rows], device=model.device
    )
    inputs = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": is_text}
    predicted = labels != IGNORED
    if model.config.model_type in _WITH_A_FAMILY:  # the head at these positions only
        states = model.base_model(**inputs).last_hidden_state[predicted]
        logits = family_of(model.config).predict(model, states)
    else:
        logits = model(**inputs).logits[predicted]
    losses = torch.zeros(labels.shape, device=model.device)
    losses[predicted] = cross_entropy(logits.float(), labels[predicted], reduction="none")
    return (-losses.double().sum(1)).tolist()


def load_pairs(path: str, max_pairs: int | None = None) -> list[dict[str, Any]]:
    """Return the minimal pairs of a parquet file in BLiMP's columns, one paradigm after another.

    Args:
        max_pairs: of each paradigm, the first ones.
    """
    of_paradigm = {}
    for row in load_dataset("parquet", data_files=path, split="train"):
        of_paradigm.setdefault(row.get("UID", ""), []).append(row)
    return [row for _, rows in sorted(of_paradigm.items()) for row in rows[:max_pairs]]


def blimp_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, str]],
    within_word: bool = False,
    batch_size: int = 128,
) -> dict[str, dict[str, float]]:
    """Return the share of minimal pairs whose grammatical sentence is likelier (Warstadt et al., arXiv 1912.00582).

    A tie counts as right, as in lm-eval.

    Args:
        pairs: rows with `sentence_good`, `sentence_bad`, `UID` and, if there is one, `linguistics_term`.
        within_word, batch_size: see `sentence_scores`.

    Returns:
        "overall", "by_phenomenon" (of `linguistics_term`) and "by_paradigm" (of `UID`): accuracies by name, of which
        "overall" has the mean over all pairs.

    Raises:
        ValueError: no pairs; see `sentence_scores`.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("there are no pairs of sentences")
    if lacking := {"sentence_good", "sentence_bad", "UID"} - pairs[0].keys():
        raise ValueError(f"the pairs have no column {', '.join(sorted(lacking))}, only {', '.join(pairs[0])}")
    sentences = [pair[column] for column in ("sentence_good", "sentence_bad") for pair in pairs]
    scores = sentence_scores(model, tokenizer, sentences, within_word, batch_size)
    right = [good >= bad for good, bad in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]

    def accuracy(column: str) -> dict[str, float]:
        groups = {}
        for pair, is_right in zip(pairs, right, strict=True):
            groups.setdefault(pair.get(column, "all"), []).append(is_right)
        return {name: sum(found) / len(found) for name, found in sorted(groups.items())}

    return {
        "overall": {"accuracy": sum(right) / len(right), "pairs": len(pairs)},
        "by_phenomenon": accuracy("linguistics_term"),
        "by_paradigm": accuracy("UID"),
    }


@dataclass(frozen=True)
class DocumentLosses:
    """The loss of a language model on each of several texts.

    Args:
        nats: the sum over the predicted tokens of each text.
        tokens: how many they are.
    """

    nats: list[float]
    tokens: list[int]

    @property
    def mean(self) -> float:
        """The loss in nats per predicted token of all texts."""
        return sum(self.nats) / sum(self.tokens)


def document_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    mlm_probability: float = 0.15,
    seed: int = 0,
    batch_size: int = 16,
) -> DocumentLosses:
    """Return the loss of each text, by itself: of every token under a decoder, of masked tokens under an encoder.

    Args:
        window: tokens that the model reads at once; None takes as many as it can.
        stride: tokens that each window of a decoder predicts; all others are context. None takes half a window; a
            whole window is the cheapest, and the loss the highest. An encoder reads windows that do not overlap.
        mlm_probability: share of an encoder's tokens to predict.
        seed: of the masks, which are the same for all models with this tokenizer, window and probability.
        batch_size: windows of one forward.

    Raises:
        ValueError: no language model, a stride or window out of range, or no text.
    """
    objective = objective_of(model)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or window or 2048
    window = most if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride <= window <= most:
        raise ValueError(f"{stride=} and {window=} must be in order: 1, stride, window, {most} positions")
    if objective == "clm":
        rows = [row for i, text in enumerate(texts) for row in _windows(tokenizer, text, window, stride, i)]
    else:
        collator = MaskedLanguageModelingCollator(tokenizer, mlm_probability, seed=seed)
        rows = [row for i, text in enumerate(texts) for row in _masked_rows(tokenizer, collator, text, window, i)]
    tokens = [0] * len(texts)
    for row in rows:
        tokens[row["text"]] += sum(label != IGNORED for label in row["labels"])
    if not any(tokens):
        raise ValueError("the texts have no tokens")
    scores = _text_scores(model, rows, len(texts), batch_size, tokenizer.pad_token_id or 0)
    return DocumentLosses([-score for score in scores], tokens)


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str, window: int, stride: int, index: int
) -> Iterator[dict[str, Any]]:
    ids = [start_token(tokenizer), *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    first = 1  # the next token to predict
    while first < len(ids):
        # The first window has no context to spare.
        last = min(first + (window if first == 1 else stride), len(ids))
        begin = max(last - 1 - window, 0)
        labels = [IGNORED] * (first - 1 - begin) + ids[first:last]
        yield {"input_ids": ids[begin : last - 1], "labels": labels, "text": index}
        first = last


def _masked_rows(
    tokenizer: PreTrainedTokenizerBase, collator: MaskedLanguageModelingCollator, text: str, window: int, index: int
) -> Iterator[dict[str, Any]]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    piece = window - 2  # between [CLS] and [SEP]
    for start in range(0, len(ids), piece):
        row = np.array([tokenizer.cls_token_id, *ids[start : start + piece], tokenizer.sep_token_id])
        # A mask depends on the text and the place of the row.
        places = {"index": index, "epoch": start}
        batch = collator([{"input_ids": row, "document_ids": np.zeros_like(row), **places}])
        yield {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist(), "text": index}


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    window: int | None = None,
    stride: int | None = None,
) -> dict[str, float]:
    """Return the perplexity of a decoder on texts, each by itself, in overlapping windows.

    Args:
        window, stride: see `document_losses`.

    Returns:
        `per_token` and `per_word` perplexity (words end at white space), `nats_per_token`, and the numbers of `tokens`
        and `words`.

    Raises:
        ValueError: an encoder, a stride or window out of range, or no text.
    """
    if objective_of(model) != "clm":
        raise ValueError(f"perplexity is for decoders: a {type(model).__name__} predicts masked tokens")
    texts = list(texts)
    losses = document_losses(model, tokenizer, texts, window, stride, batch_size=1)
    total, words = sum(losses.nats), sum(len(text.split()) for text in texts)
    return {
        "per_token": _exp(losses.mean),
        "per_word": _exp(total / words) if words else math.inf,
        "nats_per_token": losses.mean,
        "tokens": sum(losses.tokens),
        "words": words,
    }


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:  # as for a text without spaces, which is one word
        return math.inf
