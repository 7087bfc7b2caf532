"""Tokenizers: training, loading, and the check for an objective.

A trained tokenizer is a stock `BertTokenizer` or `GPT2Tokenizer`, trained with its own normaliser and pre-tokeniser,
so that it loads without this package.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator

from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

BERT_SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_OF_TEXT = "<|endoftext|>"
NEEDED_TOKENS = {"mlm": ["pad_token", "cls_token", "sep_token", "mask_token"], "clm": ["pad_token", "eos_token"]}
MAX_ALPHABET = 1000  # characters of a WordPiece vocabulary; rarer ones become [UNK], as in BERT
TEXTS_PER_BATCH = 1000
ENDLESS_WORD = re.compile(r"\S{1000}")
NO_TEXT = "the corpus holds no text to train a tokenizer on"


def train_tokenizer(
    kind: str, documents: Dataset | IterableDataset, vocab_size: int, model_max_length: int, lowercase: bool = True
) -> PreTrainedTokenizerBase:
    """Train a tokenizer. The same documents always give the same vocabulary.

    Args:
        kind: `"wordpiece"` gives a `BertTokenizer` ([PAD] is id 0), `"byte_bpe"` a `GPT2Tokenizer`, whose
            `<|endoftext|>` (id 0) begins, ends and pads.
        documents: rows with a `text`, for example from `load_documents`.
        vocab_size: the most tokens, including special ones; a small corpus gives fewer.
        model_max_length: tokens of the longest sequence that the model takes.
        lowercase: lower-case the text and strip accents (WordPiece only).

    Raises:
        ValueError: for an unknown kind, a corpus without text, or a `vocab_size` that the special tokens
            and the alphabet alone exceed.
    """
    if kind == "wordpiece":
        return _train_wordpiece(documents, vocab_size, model_max_length, lowercase)
    if kind == "byte_bpe":
        return _train_byte_bpe(documents, vocab_size, model_max_length)
    raise ValueError(f"kind must be 'wordpiece' or 'byte_bpe', not {kind!r}")


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or of the Hub; one without a pad token pads with its end token.

    Raises:
        ValueError: if no tokenizer, or only one without a vocabulary, is found at `name_or_path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        if len(tokenizer) == len(tokenizer.all_special_ids):  # as for a folder without a vocabulary
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {str(name_or_path)!r}: give a folder that holds tokenizer.json "
            f"and tokenizer_config.json, or a model name on the Hub that can be reached ({error})"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def serialized(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the tokens of a text depend on, to be hashed.

    Raises:
        ValueError: a tokenizer that is not fast.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer, which is needed here")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    sides = [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_input_names]
    return json.dumps([{**state, "padding": None, "truncation": None}, sides])  # they change with every call


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Raise a ValueError unless the tokenizer has the special tokens that `kind`, "mlm" or "clm", needs."""
    if kind not in NEEDED_TOKENS:
        raise ValueError(f"kind must be 'mlm' or 'clm', not {kind!r}")
    missing = [name for name in NEEDED_TOKENS[kind] if getattr(tokenizer, name) is None]
    if missing:
        raise ValueError(f"{type(tokenizer).__name__} has no {' and no '.join(missing)}, which {kind} needs")


def text_batches(documents: Dataset | IterableDataset) -> Iterator[list[str]]:
    """Yield the documents' texts in lists of at most 1000, without characters that a tokenizer rejects.

    The time of training grows with the square of a word's length, so words of 1000 characters are split.
    """
    for batch in documents.iter(TEXTS_PER_BATCH):
        yield [ENDLESS_WORD.sub(r"\g<0> ", encodable(text)) for text in batch["text"]]


def encodable(text: str | None) -> str:
    """Return `text` with question marks for lone surrogates, which no tokenizer accepts; "" for None."""
    return (text or "").encode("utf-8", "replace").decode()


def _train_wordpiece(documents, vocab_size, model_max_length, lowercase):
    backend = BertTokenizer(do_lower_case=lowercase).backend_tokenizer
    alphabet = _frequent_characters(documents, backend.normalizer)
    # The trainer would number the continued characters in the random order of a hash map, which decides ties
    # between merges. As special tokens they have fixed numbers.
    given_tokens = BERT_SPECIAL_TOKENS + ["##" + c for c in alphabet if _continues_words(c, backend)]
    _check_vocab_size(vocab_size, len(given_tokens) + len(alphabet))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=given_tokens,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(text_batches(documents), trainer)
    return BertTokenizer(backend.get_vocab(), do_lower_case=lowercase, model_max_length=model_max_length)


def _train_byte_bpe(documents, vocab_size, model_max_length):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _check_vocab_size(vocab_size, 1 + len(alphabet))
    if not any(text.strip() for texts in text_batches(documents) for text in texts):
        raise ValueError(NO_TEXT)
    tokenizer = GPT2Tokenizer(pad_token=END_OF_TEXT, model_max_length=model_max_length)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.backend_tokenizer.train_from_iterator(text_batches(documents), trainer)
    return tokenizer


def _frequent_characters(documents, normalizer) -> list[str]:
    counts = Counter()
    for texts in text_batches(documents):
        counts.update(normalizer.normalize_str(" ".join(texts)))
    ranked = sorted((-count, character) for character, count in counts.items() if not character.isspace())
    if not ranked:
        raise ValueError(NO_TEXT)
    return [character for _, character in ranked[:MAX_ALPHABET]]


def _continues_words(character: str, backend: Tokenizer) -> bool:
    """Return False for characters that are words of their own: punctuation and CJK."""
    normalized = backend.normalizer.normalize_str("a" + character)
    return len(backend.pre_tokenizer.pre_tokenize_str(normalized)) == 1


def _check_vocab_size(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}, but the special tokens and the alphabet alone need {least}")
