"""Packed batches: several documents in a row, none seen by another.

A model takes `document_ids` [batch, seq]: equal, contiguous numbers within a document. From them come the
positions, which restart in every document, and what keeps documents apart: a block-diagonal mask, the sequence
lengths that flash attention takes instead, or the texts that attention in pieces takes on a CPU.
"""

import itertools

import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask, packed_sequence_mask_function
from transformers.utils.generic import is_flash_attention_requested

from .dropout import runs_plainly_on_cpu


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """Return where a document starts, bool [batch, seq]."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return starts


def document_positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Return the position of each token in its document, [batch, seq]."""
    indices = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return indices - torch.where(document_starts(document_ids), indices, 0).cummax(dim=1).values


def _slices(lengths: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(lengths))
    return [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]


def check_length(config, length: int):
    """Raise a ValueError if `length` exceeds the model's positions."""
    if length > config.max_position_embeddings:
        raise ValueError(
            f"the sequence has {length} tokens, but max_position_embeddings={config.max_position_embeddings}: "
            "truncate it, or train a model with more positions"
        )


def check_positions(config, position_ids: torch.Tensor):
    """Raise a ValueError on a CPU if the model has no embedding for one of `position_ids`.

    A row of several documents, whose positions restart, may be longer than `max_position_embeddings`. On
    other devices the check would wait for the device, which raises its own error.
    """
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        for position in map(int, position_ids.aminmax()):
            if not 0 <= position < config.max_position_embeddings:
                raise ValueError(
                    f"position_ids contains {position}, but max_position_embeddings={config.max_position_embeddings}: "
                    "positions begin at 0; truncate longer texts, or train a model with more positions"
                )


def attention_inputs(
    config, is_causal: bool, inputs_embeds, attention_mask=None, document_ids=None, position_ids=None, cache=None
) -> tuple[torch.Tensor | None, dict]:
    """Return the mask and the arguments by which attention sees the right tokens only, for its implementation.

    Args:
        inputs_embeds: [batch, seq, hidden].
        attention_mask: [batch, keys], 0 where a token is padding, or a finished mask of four dimensions.
        document_ids: [batch, seq] of a packed batch. Padding is a document of its own, so there is no mask.
        position_ids: as the caller gave them. Where they restart, a causal model begins a new document, as stock
            models do, unless there is a mask or a cache. An encoder does not, as stock BERT does not: give it
            `document_ids`.

    Returns:
        The mask, and keyword arguments for every attention layer.

    Raises:
        ValueError: `document_ids` of another shape than the tokens, or together with a mask or a cache.
    """
    if document_ids is None:
        if is_causal:
            # Flash attention takes no mask, and reads the documents from the positions.
            positions = {} if position_ids is None else {"position_ids": position_ids}
            return create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids), positions
        return create_bidirectional_mask(config, inputs_embeds, attention_mask), {}
    if attention_mask is not None:
        raise ValueError("document_ids already separate padding from text: leave out attention_mask")
    if document_ids.shape != inputs_embeds.shape[:2]:
        shapes = list(document_ids.shape), list(inputs_embeds.shape[:2])
        raise ValueError("document_ids of shape {} must have that of the tokens, {}".format(*shapes))
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("document_ids describe whole rows: they cannot go with past_key_values")
    if is_flash_attention_requested(config):
        # This waits for the device once per forward. The longest length may be any upper bound.
        starts = document_starts(document_ids).flatten().nonzero().flatten()
        ends = starts.new_tensor([document_ids.numel()])
        lengths = torch.cat([starts, ends]).to(torch.int32)
        longest = document_ids.shape[1]
        return None, {
            "cu_seq_lens_q": lengths,
            "cu_seq_lens_k": lengths,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    if config._attn_implementation == "sdpa" and runs_plainly_on_cpu(inputs_embeds):
        lengths = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in document_ids]
        if all(len(parts) == 1 for parts in lengths):
            return None, {}
        return None, {"texts": [(row, part) for row, parts in enumerate(map(_slices, lengths)) for part in parts]}
    same_document = packed_sequence_mask_function(document_ids)
    if is_causal:
        return create_causal_mask(config, inputs_embeds, None, None, and_mask_function=same_document), {}
    return create_bidirectional_mask(config, inputs_embeds, None, and_mask_function=same_document), {}
