"""Packing documents into blocks of equal length, without losing a token.

Documents fill block after block. If one crosses the end of a block, the rest starts the next block as a segment
of its own; `document_ids` number the segments of a block, so that attention can keep them apart.
BERT's segments are each wrapped in [CLS] … [SEP]; GPT's documents each end in <|endoftext|>.
"""

import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain, islice

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from .arrow_cache import cached_dataset
from .tokenizers import TEXTS_PER_BATCH, encodable, serialized

PACKING_VERSION = 1  # increase it with every change to the blocks of the same text
MIN_BLOCK_SIZE = 8
BLOCKS_PER_BATCH = 1000
PIECE_CHARACTERS = 100_000  # long texts are tokenized in pieces, since a tokenizer's memory is many times its text
PIECES_PER_CALL = 64
WORD_END = re.compile(r"(?<=\S)(?=[ \n\t])")  # no tokenizer here has a word across such a place
PADDING = -1  # the document id of padding

Wrapping = tuple[list[int], list[int]]  # token ids before and after


def pack(
    documents: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    separate_documents: bool = True,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenise documents and pack them into blocks.

    Args:
        documents: rows with a `text`.
        tokenizer: with [CLS] and [SEP], they wrap every segment; otherwise every document ends with the
            end-of-text token.
        block_size: tokens per block, at least 8.
        separate_documents: number the segments, wrap the two parts of a cut document each, and pad where no
            further segment fits. Otherwise the documents, each wrapped once, form one stream that is cut
            into blocks; all document ids are 0, and the last, incomplete block is dropped.
        num_proc: processes that tokenise; by default one, with the tokenizer's own threads.

    Returns:
        Rows of `input_ids` and `document_ids`, int32 [block_size] both. Padding has the document id -1. A
        `Dataset` is tokenised and packed once and cached; an `IterableDataset` is packed while it is read.

    Raises:
        ValueError: for a block size that is too small, a tokenizer without the tokens needed, or a corpus that does
            not fill one block (for a stream, when it is read).
    """
    if block_size < MIN_BLOCK_SIZE:
        raise ValueError(f"block_size must be at least {MIN_BLOCK_SIZE} tokens, not {block_size}")
    if separate_documents and tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad_token, which separate documents need")
    whole, cut = _wrappings(tokenizer, separate_documents)
    tokenize = partial(_tokenize, tokenizer=tokenizer, wrapping=whole)
    fill = partial(
        _fill_blocks,
        block_size=block_size,
        wrapping=cut,
        pad_token_id=tokenizer.pad_token_id,
        separate_documents=separate_documents,
    )
    block = List(Value("int32"), length=block_size)
    features = Features({"input_ids": block, "document_ids": block})
    if isinstance(documents, IterableDataset):
        tokens = documents.map(
            tokenize, batched=True, batch_size=TEXTS_PER_BATCH, remove_columns=documents.column_names
        )
        return IterableDataset.from_generator(partial(_stream_rows, tokens, fill), features=features)

    # `datasets` has no public name for the hash of a data set's contents.
    tokens_key = Hasher.hash([PACKING_VERSION, documents._fingerprint, serialized(tokenizer), whole])
    blocks_key = Hasher.hash([tokens_key, block_size, cut, tokenizer.pad_token_id, separate_documents])

    def tables() -> Iterator[pa.Table]:
        tokens = documents.map(
            tokenize,
            batched=True,
            batch_size=TEXTS_PER_BATCH,
            remove_columns=documents.column_names,
            features=Features({"tokens": List(Value("int32"))}),
            num_proc=num_proc,
            new_fingerprint=tokens_key,
            desc="Tokenising",
        )
        rows = fill(_token_arrays(tokens))
        while batch := list(islice(rows, BLOCKS_PER_BATCH)):
            columns = [
                pa.FixedSizeListArray.from_arrays(np.concatenate(column), block_size)
                for column in zip(*batch, strict=True)
            ]
            yield pa.table(columns, names=list(features))

    return cached_dataset(f"blocks-{blocks_key}", features, tables)


def _wrappings(tokenizer: PreTrainedTokenizerBase, separate_documents: bool) -> tuple[Wrapping, Wrapping]:
    """Return the tokens around a whole document, and those around each segment that packing cuts it into."""
    if tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None:
        around = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        return (([], []), around) if separate_documents else (around, ([], []))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has neither cls_token and sep_token nor eos_token")
    return ([], [tokenizer.eos_token_id]), ([], [])


def _tokenize(batch: dict[str, list], tokenizer: PreTrainedTokenizerBase, wrapping: Wrapping) -> dict[str, list]:
    before, after = wrapping
    pieces = [_cut_at_words(encodable(text)) for text in batch["text"]]
    tokens = _piece_tokens(list(chain.from_iterable(pieces)), tokenizer)
    documents = []
    for count in map(len, pieces):
        text_tokens = list(chain.from_iterable(islice(tokens, count)))
        wrapped = [*before, *text_tokens, *after] if text_tokens else []
        documents.append(np.array(wrapped, dtype=np.int32))
    return {"tokens": documents}


def _cut_at_words(text: str) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > PIECE_CHARACTERS:
        earliest, latest = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        cut = WORD_END.search(text, earliest, latest)
        end = cut.start() if cut else latest  # nothing this long is a word
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _piece_tokens(pieces: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for start in range(0, len(pieces), PIECES_PER_CALL):
        yield from tokenizer(
            pieces[start : start + PIECES_PER_CALL],
            add_special_tokens=False,
            split_special_tokens=True,  # a "[SEP]" in a text is ordinary text
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def _fill_blocks(
    documents: Iterable[np.ndarray],
    block_size: int,
    wrapping: Wrapping,
    pad_token_id: int | None,
    separate_documents: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (input ids, document ids), int32 [block_size] both."""
    before, after = (np.array(ids, dtype=np.int32) for ids in wrapping)

    def empty_block():
        pad = 0 if pad_token_id is None else pad_token_id
        return np.full(block_size, pad, np.int32), np.full(block_size, PADDING, np.int32)

    (input_ids, document_ids), used, segment, num_blocks = empty_block(), 0, 0, 0
    for tokens in documents:
        start = 0
        while start < len(tokens):
            room = block_size - used - len(before) - len(after)
            if room < 1:
                yield input_ids, document_ids
                (input_ids, document_ids), used, segment, num_blocks = empty_block(), 0, 0, num_blocks + 1
                continue
            wrapped = np.concatenate([before, tokens[start : start + room], after])
            input_ids[used : used + len(wrapped)] = wrapped
            document_ids[used : used + len(wrapped)] = segment
            start += room
            used += len(wrapped)
            if separate_documents:
                segment += 1
    if num_blocks == 0 and used < block_size:
        raise ValueError(f"the corpus has {used} tokens, which do not fill one block of {block_size}")
    if used == block_size or (used and separate_documents):
        yield input_ids, document_ids


def _token_arrays(tokens: Dataset) -> Iterator[np.ndarray]:
    for table in tokens.with_format("arrow").iter(TEXTS_PER_BATCH):
        yield from table["tokens"].to_numpy()


def _stream_rows(tokens: IterableDataset, fill) -> Iterator[dict[str, np.ndarray]]:
    for input_ids, document_ids in fill(np.asarray(row["tokens"], dtype=np.int32) for row in tokens):
        yield {"input_ids": input_ids, "document_ids": document_ids}
