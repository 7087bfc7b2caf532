"""Statistics of a stock model on batches of its inputs."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import nn
from transformers import PreTrainedModel

from .linear import features

_FINAL_NORMS = (
    "norm",
    "final_layer_norm",
    "ln_f",
    "final_norm",
)  # of the hidden states that the vocabulary head reads
_ROWS_READ = 256  # of a batch, whose predictions are compared from layer to layer


@torch.no_grad()
def autocorrelations(
    model: PreTrainedModel, names: Iterable[str], batches: list[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Return the mean of x·xᵀ over the inputs of linear maps, [in, in] in float64.

    Args:
        names: of modules of the base model.
        batches: of the model's inputs, or of packed text (`document_ids` in the place of a mask). What the masks leave
            out is not counted.

    Raises:
        ValueError: a map has fewer inputs than channels, or none.
    """
    sums, counts = {}, {}

    def counter(name: str):
        def count(module, inputs):
            rows = _unmasked(name, inputs[0], batch).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return count

    base = model.base_model
    hooks = [base.get_submodule(name).register_forward_pre_hook(counter(name)) for name in names]
    with _evaluating(model, hooks):
        for batch in _on_device(model, batches):
            model(**batch)
    for name in names:
        _, size = features(base.get_submodule(name))
        if counts.get(name, 0) < size:
            raise ValueError(f"calibration gives {name} {counts.get(name, 0)} inputs of {size} channels: give more")
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def drift(model: PreTrainedModel, layers: list[str], batches: list[Mapping[str, torch.Tensor]]) -> list[float]:
    """Return how far each layer moves the hidden states.

    It is the KL divergence in nats between the vocabulary head's predictions before and after the layer or, in a model
    without such a head, one minus the states' cosine.

    Args:
        layers: their names in the base model.
    """
    base = model.base_model
    head = model.get_output_embeddings()
    norm = next((getattr(base, name) for name in _FINAL_NORMS if hasattr(base, name)), None)
    totals, counts = [0.0] * len(layers), [0] * len(layers)

    def counter(place: int):
        def count(module, args, kwargs, outputs):
            before = args[0] if args else kwargs["hidden_states"]
            after = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            before, after = (_unmasked(layers[place], state, batch)[:_ROWS_READ] for state in (before, after))
            if head is None or norm is None:
                moved = 1 - torch.cosine_similarity(before, after, dim=-1)
            else:
                before, after = (head(norm(state)).double().log_softmax(-1) for state in (before, after))
                moved = nn.functional.kl_div(after, before, log_target=True, reduction="none").sum(-1)
            totals[place] += float(moved.sum())
            counts[place] += len(moved)

        return count

    hooks = [
        base.get_submodule(name).register_forward_hook(counter(i), with_kwargs=True) for i, name in enumerate(layers)
    ]
    with _evaluating(model, hooks):
        for batch in _on_device(model, batches):
            model(**batch)
    return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]


def _evaluating(model: nn.Module, hooks: list) -> ExitStack:
    """Return a context with the model in eval mode, after which its mode is restored and `hooks` are removed."""
    stack = ExitStack()
    stack.callback(model.train, model.training)
    for hook in hooks:
        stack.callback(hook.remove)
    model.eval()
    return stack


def _on_device(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]):
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise ValueError(f"a batch of calibration must be a mapping of the model's inputs, not a {type(batch)}")
        largest = int(batch["input_ids"].max()) if "input_ids" in batch else -1
        if largest >= _vocabulary(model):
            raise ValueError(
                f"calibration has the token {largest}, and the vocabulary {_vocabulary(model)} tokens: its text "
                "is of another tokenizer"
            )
        batch = dict(batch)
        if "document_ids" in batch:  # of packed text, which stock models read across its documents
            batch["attention_mask"] = (batch.pop("document_ids") >= 0).long()
        yield {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}


def _vocabulary(model: PreTrainedModel) -> float:
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return torch.inf if size is None else size


def _unmasked(name: str, states: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the rows [n, channels] of a module's states which no mask of the batch leaves out."""
    masks = ["attention_mask", "decoder_attention_mask"]
    for mask_name in reversed(masks) if "decoder" in name.split(".") else masks:
        mask = batch.get(mask_name)
        if mask is not None and mask.shape == states.shape[:-1]:
            return states[mask.bool()]
    return states.flatten(0, -2)
