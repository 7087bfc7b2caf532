"""Blocks to batches: the tokens that are masked, and the labels."""

import math

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..modeling.losses import IGNORED
from .packing import PADDING
from .tokenizers import check_tokenizer

CONTINUATION = "##"
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the predicted tokens; the rest stay as they are (BERT, section 3.1)


class MaskedLanguageModelingCollator:
    """Collate blocks, and mask tokens as BERT does.

    In each row, `mlm_probability * n` of its n ordinary tokens (neither special nor padding) are to be predicted,
    rounded up or down at random so that the mean over the rows is `mlm_probability`: 80 % of them show [MASK], 10 % a
    random ordinary token, 10 % themselves. The choice is a pure function of (seed, epoch, index), so a resumed run,
    or one over several processes, makes the same.

    Args:
        tokenizer: the tokenizer that made the blocks.
        mlm_probability: share of the ordinary tokens to predict, in (0, 1].
        whole_word: choose words, not tokens, in random order; one that would exceed the row's number of
            predictions is skipped, so a row may have fewer.
        seed: of the masks, a non-negative integer.
        separate_documents: pass `document_ids` to the model.
        count_predictions: pass `num_predictions` to the model, which stock models do not take.

    Called with rows of `Blocks`, it returns `input_ids` and `labels`, int64 [batch, seq] (-100 where nothing
    is predicted), `num_predictions`, the int that bounds the predictions of any batch of this shape, and
    `document_ids`, int64 [batch, seq], where documents are separate.

    Raises:
        ValueError: for a probability out of range, a tokenizer without the special tokens of masked language
            modeling, and `whole_word` with a tokenizer that does not mark continuations by "##".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        whole_word: bool = False,
        seed: int = 0,
        separate_documents: bool = True,
        count_predictions: bool = True,
    ):
        check_tokenizer(tokenizer, "mlm")
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability must be in (0, 1], not {mlm_probability}")
        vocabulary = tokenizer.get_vocab()
        size = max(vocabulary.values()) + 1
        self.is_special = np.isin(np.arange(size), tokenizer.all_special_ids)
        self.ordinary_ids = np.setdiff1d(list(vocabulary.values()), tokenizer.all_special_ids)
        continuations = [i for token, i in vocabulary.items() if token.startswith(CONTINUATION)]
        if whole_word and not continuations:
            raise ValueError(
                f'whole_word needs a tokenizer that marks continuations by "{CONTINUATION}", which '
                f"{type(tokenizer).__name__} does not"
            )
        self.is_continuation = np.isin(np.arange(size), continuations)
        self.mask_token_id = tokenizer.mask_token_id
        self.mlm_probability = mlm_probability
        self.whole_word = whole_word
        self.seed = seed
        self.separate_documents = separate_documents
        self.count_predictions = count_predictions

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor | int]:
        input_ids, document_ids = _stacked(rows)
        num_rows, length = input_ids.shape
        generators = [np.random.default_rng([self.seed, row["epoch"], row["index"]]) for row in rows]
        uniform = np.stack([generator.random((3, length)) for generator in generators])
        priority, treatment, replacement = uniform.swapaxes(0, 1)

        maskable = ~self.is_special[input_ids] & (document_ids != PADDING)
        shares = self.mlm_probability * maskable.sum(1)
        roundings = np.array([generator.random() for generator in generators])
        budgets = (np.floor(shares) + (roundings < shares % 1)).astype(int)
        if self.whole_word:
            continued = self._continued(input_ids, document_ids, maskable)
            choice = zip(maskable, continued, priority, budgets, strict=True)
            chosen = np.stack([_choose_words(*row) for row in choice])
        else:
            ranks = np.where(maskable, priority, 2.0).argsort(1).argsort(1)
            chosen = ranks < budgets[:, None]

        labels = np.where(chosen, input_ids, IGNORED)
        masked = chosen & (treatment < MASK_SHARE)
        replaced = chosen & (treatment >= 1 - RANDOM_SHARE)
        random_ids = self.ordinary_ids[(replacement * len(self.ordinary_ids)).astype(int)]
        input_ids = np.where(masked, self.mask_token_id, np.where(replaced, random_ids, input_ids))
        batch = _batch(input_ids, labels, document_ids, self.separate_documents)
        if self.count_predictions:
            batch["num_predictions"] = num_rows * math.ceil(self.mlm_probability * length)
        return batch

    def _continued(self, input_ids, document_ids, maskable) -> np.ndarray:
        """Return where a token continues the word of the token before it, bool [batch, seq]."""
        continued = self.is_continuation[input_ids] & maskable
        continued[:, 0] = False
        continued[:, 1:] &= maskable[:, :-1] & (document_ids[:, 1:] == document_ids[:, :-1])
        return continued


class CausalLanguageModelingCollator:
    """Collate blocks in which every token is predicted from those before it in its document.

    Called with rows of `Blocks`, it returns `input_ids` and `labels`, int64 [batch, seq]; the model shifts the
    labels by one. They are -100 on padding and, where documents are separate, on the first token of every
    document but the row's first; then there are `document_ids`, int64 [batch, seq], too.
    """

    def __init__(self, separate_documents: bool = True):
        self.separate_documents = separate_documents

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        input_ids, document_ids = _stacked(rows)
        labels = np.where(document_ids == PADDING, IGNORED, input_ids)
        if self.separate_documents:
            labels[:, 1:][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORED
        return _batch(input_ids, labels, document_ids, self.separate_documents)


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return blocks as a batch: `input_ids` and `document_ids` (-1 at padding), int64 [batch, seq] both."""
    input_ids, document_ids = map(torch.from_numpy, _stacked(rows))
    return {"input_ids": input_ids, "document_ids": document_ids}


def _stacked(rows: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.stack([row[column] for row in rows]).astype(np.int64) for column in ("input_ids", "document_ids"))


def _batch(input_ids, labels, document_ids, separate_documents: bool) -> dict[str, torch.Tensor]:
    arrays = {"input_ids": input_ids, "labels": labels}
    if separate_documents:
        arrays["document_ids"] = document_ids
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _choose_words(maskable, continued, priority, budget: int) -> np.ndarray:
    """Choose whole words of one row in the order of their first tokens' priority, `budget` tokens at most."""
    starts = np.flatnonzero(maskable & ~continued)
    words = np.cumsum(maskable & ~continued) - 1  # the word that each maskable position belongs to
    lengths = np.bincount(words[maskable], minlength=len(starts))
    taken = np.zeros(len(starts), dtype=bool)
    for word in priority[starts].argsort():
        if lengths[word] <= budget:
            taken[word] = True
            budget -= lengths[word]
        if budget == 0:
            break
    return maskable & np.append(taken, False)[words]
