"""The loss of a vocabulary head, at the predicted positions only, without keeping all logits.

A masked language model predicts about 15 % of its positions: gathering their hidden states first saves 85 % of
the head, and the float32 logits of all positions, which are the largest tensor of a training step.
"""

import torch
from torch import nn

IGNORED = -100
# Logits that are computed at once, 256 MiB in float32 on a CPU. Other devices want larger products.
# (F.linear_cross_entropy of torch 2.13 took twice the time of the plain form on a CPU and does not compile.)
MAX_LOGITS = {"cpu": 2**26, "other": 2**28}


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


def _sum_of_cross_entropies(hidden_states, weight, bias, labels) -> torch.Tensor:
    logits = nn.functional.linear(hidden_states, weight, bias)
    return _cross_entropy(logits, labels)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """`_sum_of_cross_entropies`, whose gradients are computed along with it.

    The logits of a piece of the rows are computed once, become their own gradient in place, and are gone before those
    of the next piece: all logits are never kept, and nothing is computed twice. The gradient of the weight is a
    tensor of its own, to which autograd adds that of tied embeddings in place.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels):
        needs_hidden_states, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dtype, exact = _computing_dtype(hidden_states), torch.promote_types(hidden_states.dtype, torch.float32)
        matrix = weight.to(dtype)
        of_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        of_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None
        of_hidden_states = torch.empty_like(hidden_states) if needs_hidden_states else None
        loss = torch.zeros((), dtype=exact, device=hidden_states.device)
        step = max(1, MAX_LOGITS["cpu" if weight.device.type == "cpu" else "other"] // len(weight))
        for start in range(0, len(labels), step):
            piece = slice(start, start + step)
            inputs, targets = hidden_states[piece].to(dtype), labels[piece]
            logits = nn.functional.linear(inputs, matrix, None if bias is None else bias.to(dtype))
            log_probabilities = logits.log_softmax(-1, dtype=exact)
            loss += nn.functional.nll_loss(log_probabilities, targets, ignore_index=IGNORED, reduction="sum")
            is_predicted = targets != IGNORED
            index = torch.arange(len(targets), device=targets.device), targets.where(is_predicted, 0)
            of_logits = torch.exp(log_probabilities, out=logits)
            # Not p − 1: a p near 1, rounded, would cancel.
            of_logits[index] = torch.expm1(log_probabilities[index]).to(dtype)
            is_predicted = is_predicted.to(dtype)[:, None]
            if needs_hidden_states:
                of_hidden_states[piece] = of_logits @ matrix * is_predicted
            if needs_weight:
                of_weight += of_logits.T @ (inputs * is_predicted)
            if needs_bias:
                of_bias += (of_logits.T @ is_predicted).flatten()
        ctx.save_for_backward(hidden_states, weight, bias, labels)
        # Not saved tensors, so that backward may scale them in place, and give them away.
        ctx.gradients = [
            None if of_input is None else of_input.to(of.dtype)
            for of_input, of in ((of_hidden_states, hidden_states), (of_weight, weight), (of_bias, bias))
        ]
        return loss

    @staticmethod
    def backward(ctx, gradient):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            # Taken once more, or to be differentiated.
            with torch.enable_grad():
                inputs = ctx.saved_tensors
                loss = _sum_of_cross_entropies(*inputs)
                needed = [t for t, is_needed in zip(inputs, ctx.needs_input_grad, strict=True) if is_needed]
                found = iter(torch.autograd.grad(loss, needed, gradient, create_graph=True))
            return tuple(next(found) if is_needed else None for is_needed in ctx.needs_input_grad)
        return *(None if of_input is None else of_input.mul_(gradient) for of_input in gradients), None


def _computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _is_plain_linear(head: nn.Module | None) -> bool:
    """Return whether the result of `head` is x·Wᵀ + b of its parameters, and nothing follows calls of it."""
    return (
        not torch.compiler.is_compiling()  # which fuses the plain form
        and not torch._C._are_functorch_transforms_active()
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and not head.weight.is_meta
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    head: nn.Module | None,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of `head(hidden_states)` against `labels` in nats, computed in float32 at least.

    Args:
        hidden_states: [rows, hidden].
        head: returns logits [rows, vocabulary]; None takes `hidden_states` for logits that are there already.
        labels: [rows]; -100 is ignored.
        num_items_in_batch: the divisor of the sum (from Trainer, the predictions of all accumulated batches); None
            divides by the predictions in `labels`.

    Returns:
        A scalar; 0 if nothing is predicted.
    """
    if torch.is_grad_enabled() and _is_plain_linear(head):
        loss = _LinearCrossEntropy.apply(hidden_states, head.weight, head.bias, labels)
    else:
        loss = _cross_entropy(hidden_states if head is None else head(hidden_states), labels)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum().clamp(min=1)
    return loss / num_items_in_batch
