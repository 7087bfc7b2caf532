"""Statistics of a model on calibration text: the inputs of its matrices, and how much each layer changes them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from .dense import attention_layers
from .families import family_of

TOKENS_READ = 256  # of a batch, whose predictions are compared from layer to layer


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


@contextmanager
def counting_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], rows_of: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, int]]]:
    """Sum over the inputs of modules while a model runs, in eval mode.

    Args:
        modules: by name.
        rows_of: takes a name and an input [..., channels], and returns the rows [n, channels] that count.

    Yields:
        By name, the sums of x·xᵀ in float64, and the numbers of rows.
    """
    sums, counts = {}, dict.fromkeys(modules, 0)
    last = (None, None, None, 0)  # what was counted last, since query, key and value often read the same

    def counter(name: str):
        def count(module, inputs):
            nonlocal last
            parent, _, _ = name.rpartition(".")
            if last[0] != parent or last[1] is not inputs[0]:
                rows = rows_of(name, inputs[0]).double()
                last = (parent, inputs[0], rows.T @ rows, len(rows))
            _, _, products, number = last
            sums[name] = sums[name] + products if name in sums else products
            counts[name] += number

        return count

    hooks = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
    with evaluating(model, hooks):
        yield sums, counts


@contextmanager
def evaluating(model: nn.Module, hooks: Iterable = ()) -> Iterator[None]:
    """Put a model into eval mode; restore its mode and remove `hooks` in the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


def drift_of(
    before: torch.Tensor, after: torch.Tensor, predict: Callable[[torch.Tensor], torch.Tensor] | None
) -> torch.Tensor:
    """Sum the drift (see `Calibration`) over states [n, hidden] of neighbouring layers.

    Args:
        predict: returns the logits of states, where the model has a vocabulary head.
    """
    if predict is None:
        return (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
    before, after = (predict(state).log_softmax(-1) for state in (before, after))
    return nn.functional.kl_div(after, before, log_target=True, reduction="sum")


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
    drift = torch.zeros(len(layers), dtype=torch.float64)
    is_text = None
    maps = ("projection", "output")
    modules = {f"{name} {i}": getattr(layer, name) for name in maps for i, layer in enumerate(layers)}
    # Heads of other tasks may need inputs of their own; only a vocabulary head is needed here.
    family = family_of(model.config)
    reader, predict = model.base_model, None
    if family.is_language_model(model):
        reader, predict = model, partial(family.predict, model)
    tokens = read = 0
    with counting_inputs(model, modules, lambda name, inputs: inputs[is_text]) as (sums, _):
        for batch in batches:
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise ValueError("a batch of calibration text must be a mapping with input_ids")
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            is_text = _is_text(batch)
            states = reader(**batch, output_hidden_states=True).hidden_states
            tokens += int(is_text.sum())
            states = [state[is_text][:TOKENS_READ] for state in states]
            states[:-1] = [family.normed(model, state) for state in states[:-1]]
            read += len(states[0])
            for i, (before, after) in enumerate(pairwise(states)):
                drift[i] += float(drift_of(before, after, predict))
    if tokens < size:
        raise ValueError(f"the calibration text has {tokens} tokens, fewer than hidden_size={size}: give more")
    inputs, contexts = ([sums[f"{name} {i}"] / tokens for i in range(len(layers))] for name in maps)
    return Calibration(inputs, contexts, drift=(drift / read).tolist())


def _is_text(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "document_ids" in batch:
        return batch["document_ids"] >= 0
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
