"""The loss of a vocabulary head, at the predicted positions only, without keeping all logits.

A masked language model predicts about 15 % of its positions: gathering their hidden states first saves 85 % of
the head, and the float32 logits of all positions, which are the largest tensor of a training step.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
# Logits above this many are computed in pieces, and again for the backward pass: 2 GiB in float32.
# (F.linear_cross_entropy of torch 2.13 took twice the time of the plain form on a CPU and does not compile.)
MAX_LOGITS = 2**29


def predicted_positions(labels: torch.Tensor, num_predictions: int | None = None) -> torch.Tensor | None:
    """Return the positions whose label is not -100, as indices into `labels.flatten()`, [predictions].

    Args:
        labels: [batch, seq].
        num_predictions: an upper bound of the predictions in the batch. With it the result has that length
            (padded with positions labelled -100), so shapes are static: no wait for the device, and no graph
            break. Without it the result is None under `torch.compile` and `torch.func.vmap`: predict everywhere.

    Raises:
        ValueError: more labels than `num_predictions`, on a CPU. On other devices the rest is ignored, since the check
            would wait for the device.
    """
    ignored = labels.flatten() == IGNORED
    if num_predictions is not None:
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            found = int((~ignored).sum())
            if found > num_predictions:
                raise ValueError(
                    f"num_predictions={num_predictions} must be at least the number of labels in a batch, {found}"
                )
        return ignored.int().argsort(stable=True)[:num_predictions]
    if torch.compiler.is_compiling():
        return None
    try:
        return (~ignored).nonzero().flatten()
    except RuntimeError:  # under torch.func.vmap, whose rows would differ in length
        return None


class VocabularyLogits(torch.autograd.Function):
    """`linear` whose gradient of the weight is a tensor of its own.

    Where the weight is tied to the embeddings, autograd then adds their gradient to it in place. That of
    `nn.functional.linear` is a view, so the sum is a third matrix of that size.
    (`torch.compile` does not accept a `jvp`: forward-mode differentiation needs `model.eval()`.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states, weight, bias):
        return nn.functional.linear(hidden_states, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, gradient):
        hidden_states, weight = ctx.saved_tensors
        # Under autocast the logits, and so their gradient, have another dtype than the weight.
        of_hidden_states = (gradient @ weight.to(gradient.dtype)).to(hidden_states.dtype)
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.T @ hidden_states.to(gradient.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0).to(weight.dtype)
        return of_hidden_states, of_weight, of_bias


class VocabularyHead(nn.Linear):
    """The `nn.Linear` over the vocabulary, which saves a matrix of gradients while training.

    It does so for the [rows, hidden] of a loss and an ordinary parameter; a weight that is quantized, sharded or
    replaced by `torch.func` takes the usual path. (`resize_token_embeddings` replaces it by a plain `nn.Linear`.)
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training and hidden_states.ndim == 2 and type(self.weight) is nn.Parameter:
            return VocabularyLogits.apply(hidden_states, self.weight, self.bias)
        return super().forward(hidden_states)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross-entropy, in nats, of `head(hidden_states)` against `labels`, in float32.

    Args:
        hidden_states: [rows, hidden].
        head: returns logits [rows, vocabulary].
        labels: [rows]; -100 is ignored.
        num_items_in_batch: the divisor of the sum (from Trainer, the predictions of all accumulated batches); None
            divides by the predictions in `labels`.

    Returns:
        A scalar; 0 if nothing is predicted.
    """

    def total(hidden_states, labels):
        logits = head(hidden_states).float()
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    pieces = -(-labels.numel() * head.weight.shape[0] // MAX_LOGITS)
    if pieces <= 1:
        loss = total(hidden_states, labels)
    else:
        loss = sum(
            checkpoint(total, *piece, use_reentrant=False)
            for piece in zip(hidden_states.chunk(pieces), labels.chunk(pieces), strict=True)
        )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
    return loss / num_items_in_batch
