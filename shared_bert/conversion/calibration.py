"""Statistics of a model on calibration text: the inputs of its matrices, and how much each layer changes them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from .dense import attention_layers
from .families import family_of

_TOKENS_READ = 256  # of a batch, whose predictions are compared from layer to layer


@dataclass
class Calibration:
    """Measured on text, per layer.

    Attributes:
        inputs: the mean of x·xᵀ over the inputs of the projection, [hidden, hidden] in float64.
        contexts: the same over the inputs of the output matrix.
        drift: how far the layer moves the hidden states: the KL divergence in nats between the vocabulary head's
            predictions before and after it or, in a model without such a head, one minus the states' cosine.
    """

    inputs: list[torch.Tensor]
    contexts: list[torch.Tensor]
    drift: list[float]


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> Calibration:
    """Run a `Shared…` model over batches of its inputs.

    Args:
        batches: `input_ids` [batch, seq], with `attention_mask` or `document_ids` (-1 at padding) where rows have
            padding, which is left out.

    Raises:
        ValueError: batches without `input_ids`, or fewer tokens than `hidden_size`.
    """
    layers = attention_layers(model)
    size = model.config.hidden_size
    sums = {
        name: [torch.zeros(size, size, dtype=torch.float64, device=model.device) for _ in layers]
        for name in ("projection", "output")
    }
    drift = torch.zeros(len(layers), dtype=torch.float64)
    is_text = None

    def counter(total: torch.Tensor):
        def count(module, inputs):
            rows = inputs[0][is_text].double()
            total.addmm_(rows.T, rows)

        return count

    hooks = [
        getattr(layer, name).register_forward_pre_hook(counter(totals[i]))
        for name, totals in sums.items()
        for i, layer in enumerate(layers)
    ]
    # Heads of other tasks may need inputs of their own; only a vocabulary head is needed here.
    family = family_of(model.config)
    reader = model if family.is_language_model(model) else model.base_model
    was_training = model.training
    model.eval()
    tokens = read = 0
    try:
        for batch in batches:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError("a batch of calibration text must be a mapping with input_ids")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            is_text = _is_text(batch)
            states = reader(**batch, output_hidden_states=True).hidden_states
            tokens += int(is_text.sum())
            states = [state[is_text][:_TOKENS_READ] for state in states]
            states[:-1] = [family.normed(model, state) for state in states[:-1]]
            read += len(states[0])
            for i, (before, after) in enumerate(pairwise(states)):
                drift[i] += float(_drift(model, before, after))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if tokens < size:
        raise ValueError(f"the calibration text has {tokens} tokens, fewer than hidden_size={size}: give more")
    return Calibration(
        *([total / tokens for total in totals] for totals in sums.values()), drift=(drift / read).tolist()
    )


def _is_text(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "document_ids" in batch:
        return batch["document_ids"] >= 0
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def _drift(model: PreTrainedModel, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Sum the drift over [tokens, hidden] states of neighbouring layers."""
    family = family_of(model.config)
    if not family.is_language_model(model):
        return (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
    before, after = (family.predict(model, state).log_softmax(-1) for state in (before, after))
    return torch.nn.functional.kl_div(after, before, log_target=True, reduction="sum")
