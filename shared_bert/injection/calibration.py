"""Statistics of a stock model on batches of its inputs."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from ..conversion.calibration import TOKENS_READ, counting_inputs, drift_of, evaluating
from .linear import features
from .targets import ATTENTION_NAMES, is_cross_attention

# Of the hidden states that the vocabulary head reads.
_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_norm")


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
    base = model.base_model
    modules = {name: base.get_submodule(name) for name in names}
    batch = {}
    with counting_inputs(model, modules, lambda name, states: _unmasked(model, name, states, batch)) as (sums, counts):
        for batch in _on_device(model, batches):
            model(**batch)
    for name in names:
        _, size = features(modules[name])
        if counts[name] < size:
            raise ValueError(f"calibration gives {name} {counts[name]} inputs of {size} channels: give more")
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def drift(model: PreTrainedModel, layers: list[str], batches: list[Mapping[str, torch.Tensor]]) -> list[float]:
    """Return how far each layer moves the hidden states (see `Calibration`).

    Args:
        layers: their names in the base model.
    """
    base = model.base_model
    head = model.get_output_embeddings()
    norm = next((getattr(base, name) for name in _FINAL_NORMS if hasattr(base, name)), None)
    predict = None if head is None or norm is None else lambda states: head(norm(states)).double()
    totals, counts = [0.0] * len(layers), [0] * len(layers)

    def counter(place: int):
        def count(module, args, kwargs, outputs):
            before = args[0] if args else kwargs["hidden_states"]
            after = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            before, after = (_unmasked(model, layers[place], state, batch)[:TOKENS_READ] for state in (before, after))
            totals[place] += float(drift_of(before, after, predict))
            counts[place] += len(before)

        return count

    hooks = [
        base.get_submodule(name).register_forward_hook(counter(i), with_kwargs=True) for i, name in enumerate(layers)
    ]
    with evaluating(model, hooks):
        for batch in _on_device(model, batches):
            model(**batch)
    return [total / max(count, 1) for total, count in zip(totals, counts, strict=True)]


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
    try:
        size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # of models that read no text
        size = None
    return torch.inf if size is None else size


def _unmasked(
    model: PreTrainedModel, name: str, states: torch.Tensor, batch: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return the rows [n, channels] of a module's states which no mask of the batch leaves out."""
    keys_and_values = tuple(f".{role}" for row in ATTENTION_NAMES for role in (row.key, row.value))
    reads_encoder = is_cross_attention(name) and name.endswith(keys_and_values)
    of_decoder = model.config.is_encoder_decoder and "decoder" in name.split(".") and not reads_encoder
    mask = batch.get("decoder_attention_mask" if of_decoder else "attention_mask")
    if mask is not None and mask.shape == states.shape[:-1]:
        return states[mask.bool()]
    return states.flatten(0, -2)
