"""Attention in pieces on a CPU: of one text and a few heads at a time, so that the logits stay in the CPU's cache.

torch's attention kernel for CPUs has no dropout, and computes what a mask then removes. With dropout it keeps the
weights of all texts, [batch, heads, queries, keys], with their noise. Here a piece is computed when it is needed, and
again in the backward pass, so that what is kept grows with the length of the text and not with its square. A document
of a packed batch is a piece of its own, and what lies between documents is not computed at all.
"""

import torch

from .dropout import Noise, new_seed, runs_plainly_on_cpu

MAX_LOGITS = 2**20  # of a piece: 4 MB in float32

Texts = list[tuple[int, slice]]


class _PiecewiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, texts, options):
        context = _empty_like(query)
        for piece, weights, noise, scale in _pieces(query, key, mask, texts, *options):
            dropped = weights if noise is None else weights.mul_(noise)
            context[piece] = (dropped @ value[piece].to(weights.dtype)).mul_(scale)
        ctx.save_for_backward(query, key, value, mask, context)
        ctx.texts, ctx.options = texts, options
        return context

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "attention in pieces, which a CPU uses for dropout and packed documents, cannot be differentiated "
                'twice: take attn_implementation="eager"'
            )
        query, key, value, mask, context = ctx.saved_tensors
        scaling = ctx.options[0]
        of_query, of_key, of_value = map(_empty_like, (query, key, value))
        for piece, weights, noise, scale in _pieces(query, key, mask, ctx.texts, *ctx.options):
            queries, keys, values, contexts, of_contexts = (
                tensor[piece].to(weights.dtype) for tensor in (query, key, value, context, gradient)
            )
            of_weights = (of_contexts @ values.mT).mul_(scale)
            dropped = weights
            if noise is not None:
                of_weights.mul_(noise)
                dropped = noise.mul_(weights)
            of_value[piece] = (dropped.mT @ of_contexts).mul_(scale)
            # The gradient of softmax, whose sum over the keys Σ w·∂w is that of the context over its channels.
            sums = (of_contexts * contexts).sum(-1, keepdim=True)
            of_logits = of_weights.sub_(sums).mul_(weights).mul_(scaling)
            of_query[piece] = of_logits @ keys
            of_key[piece] = of_logits.mT @ queries
        return of_query, of_key, of_value, None, None, None


def _empty_like(heads: torch.Tensor) -> torch.Tensor:
    """Return an empty [batch, heads, seq, head_dim] in which the heads of a token lie side by side."""
    batch, num_heads, length, head_dim = heads.shape
    return heads.new_empty(batch, length, num_heads, head_dim).transpose(1, 2)


def _pieces(query, key, mask, texts, scaling, dropout, is_causal, seed):
    """Yield the index of each piece, its weights [heads, queries, keys], their noise (or None) and its scale."""
    noise = Noise(dropout, seed)
    exact = torch.promote_types(query.dtype, torch.float32)
    num_heads = query.shape[1]
    for row, tokens in texts:
        num_logits = query[row, 0, tokens].shape[0] * key[row, 0, tokens].shape[0]
        step = max(1, min(num_heads, MAX_LOGITS // max(num_logits, 1)))
        for first in range(0, num_heads, step):
            piece = row, slice(first, first + step), tokens
            logits = (query[piece].to(exact) * scaling) @ key[piece].mT.to(exact)
            if is_causal:
                logits.masked_fill_(logits.new_ones(logits.shape[1:], dtype=torch.bool).triu_(1), -torch.inf)
            if mask is not None:
                of_row = mask[row if len(mask) > 1 else 0]
                of_piece = of_row[piece[1]] if len(of_row) > 1 else of_row
                if mask.dtype == torch.bool:
                    logits.masked_fill_(~of_piece, torch.finfo(logits.dtype).min)
                else:
                    logits.add_(of_piece).clamp_(min=torch.finfo(logits.dtype).min)  # all masked is no NaN
            weights = logits.softmax(-1)
            if dropout == 0:
                yield piece, weights, None, 1.0
            else:
                yield piece, weights, noise.draw(weights.shape, weights.dtype), noise.scale


def is_for_pieces(query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Return whether attention may run in pieces; a mask gets no gradient there."""
    return runs_plainly_on_cpu(query) and not (attention_mask is not None and attention_mask.requires_grad)


def mask_of_texts(texts: Texts, query: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Return true where a query sees a key, [batch, 1, queries, queries]."""
    batch, _, length, _ = query.shape
    number = torch.zeros(batch, length, dtype=torch.long)
    for index, (row, tokens) in enumerate(texts):
        number[row, tokens] = index
    seen = number[:, None, :, None] == number[:, None, None, :]
    return (seen.tril() if is_causal else seen).to(query.device)


def piecewise_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, texts: Texts | None = None, **kwargs
) -> tuple[torch.Tensor, None]:
    """Softmax attention in pieces; its gradient cannot be differentiated.

    Args:
        query: [batch, heads, queries, head_dim]; `key` and `value`: [batch, key_value_heads, keys, head_dim].
        attention_mask: [batch or 1, heads or 1, queries, keys], true where a query sees a key, or added to the logits.
        texts: the row and the tokens of every document of a packed batch; by default each row is one text.

    Returns:
        The context [batch, queries, heads, head_dim], and None for the weights.
    """
    if module.num_key_value_groups > 1:
        key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    if texts is None:
        texts = [(row, slice(None)) for row in range(len(query))]
    is_causal = module.is_causal and attention_mask is None and query.shape[2] > 1
    seed = new_seed() if dropout > 0 else 0
    context = _PiecewiseAttention.apply(query, key, value, attention_mask, texts, (scaling, dropout, is_causal, seed))
    return context.transpose(1, 2), None
