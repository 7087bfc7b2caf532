"""`from_stock`: a trained stock model, or one of this package, under another scheme and depth sharing."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling import SelfAttention, SharedAttentionConfig
from ..modeling.loading import check_loaded
from .alignment import Freedom, align_layers, can_align, check_scipy
from .calibration import calibrate
from .dense import DenseAttention, SchemeLayer, attention_layers, dense_layers, scheme_layers
from .depth_fitting import check_fit_options, copy_common, dictionary_groups_of, share_depth
from .families import STOCK_CLASSES
from .fitting import FITS, Metric, fit_scheme
from .report import ConversionReport, attention_parameters, layer_errors
from .stock import build_like, read_stock, standard_config, to_stock

_SCHEME_FIELDS = ("attention_scheme", "num_key_value_heads", "attention_scale")
_CONFIG_FIELDS = (
    "depth_shared_matrices", "num_atoms", "num_groups", "rank", "layer_ranks", "num_key_value_heads",
    "attention_scale",
)  # fmt: skip


@torch.no_grad()
def from_stock(
    model: PreTrainedModel,
    attention_scheme: str = "standard",
    depth_sharing: str = "none",
    *,
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    align: bool = True,
    dictionary_groups: int = 1,
    spread_rank: bool = False,
    **config_fields,
) -> tuple[PreTrainedModel, ConversionReport]:
    """Convert a stock BERT or GPT-2, of any head of `STOCK_CLASSES`, or a model of this package.

    The scheme is fitted first (see `fitting`), then the depth sharing (see `depth_fitting`), both without training.
    What the new model can express is kept: with as many atoms as layers, with the full rank, or if the model has the
    scheme already, its outputs are those of the old one. A model that has the scheme and the depth sharing with its
    sizes keeps its outputs, too, unless a rank is added to shared matrices, which is fitted after them.

    Args:
        calibration: batches of the model's inputs (`input_ids`, and `attention_mask` or `document_ids`). With them,
            schemes and low ranks are fitted to the matrices' results on these inputs, not to the matrices alone.
        align: rotate and reorder heads, attention unchanged, before layers share matrices.
        dictionary_groups: split the dictionary of ``masa`` into this number of groups of consecutive layers, before
            the layers that change the hidden states most on the calibration text.
        spread_rank: spread the parameters that `rank` takes in every matrix over the matrices that gain most.
        **config_fields: the new config's num_atoms, num_groups, rank, layer_ranks, depth_shared_matrices,
            num_key_value_heads and attention_scale.

    Returns:
        The converted model, in the dtype, on the device and in the mode of the old one, and what it lost.

    Raises:
        ValueError: an unknown architecture or head, an invalid config, or missing calibration text, before any
            weight is read; weights that are NaN or infinite.
        ImportError: scipy is missing, which aligning needs.
    """
    is_ours = type(model) in STOCK_CLASSES
    old_config = model.config if is_ours else standard_config(model)
    config = _new_config(old_config, attention_scheme, depth_sharing, config_fields)
    check_fit_options(
        depth_sharing, config.num_atoms, config.rank, calibration is not None, dictionary_groups, spread_rank
    )
    keeps_scheme = all(getattr(old_config, field) == getattr(config, field) for field in _SCHEME_FIELDS)
    if not keeps_scheme and attention_scheme not in FITS:
        raise ValueError(f"{attention_scheme=} cannot be fitted; from_stock takes {', '.join(FITS)}")
    if align and can_align(config):
        check_scipy()
    check_loaded(model)

    source = read_stock(to_stock(model) if is_ours else model)
    old = dense_layers(source)
    _check_finite(old)
    batches = None if calibration is None else list(calibration)
    measured = None if batches is None else calibrate(source, batches)
    inputs = [None] * len(old) if measured is None else measured.inputs
    if keeps_scheme:
        layers = scheme_layers(model if is_ours else source)  # a scheme has many bases; this is the model's own
    else:
        layers = [fit_scheme(layer, config, seen) for layer, seen in zip(old, inputs, strict=True)]
    drift = [] if measured is None else measured.drift
    groups = dictionary_groups_of(len(old), config.num_atoms, dictionary_groups, drift)
    root = None if measured is None else Metric.of(torch.stack(inputs).mean(0)).root
    if align and can_align(config):
        freedom = Freedom.of(config.scheme, config.num_key_value_heads)
        layers = align_layers(layers, config.scheme, freedom, config.shared_widths, config, groups, root)

    converted = _separate_model(source, config, layers)
    if depth_sharing != "none":
        has_ranks = config.rank or config.layer_ranks
        measured = calibrate(converted, batches) if batches is not None and has_ranks else None
        converted = share_depth(converted, config, layers, groups, root, measured, spread_rank)

    report = ConversionReport(
        attention_scheme,
        depth_sharing,
        _errors(old, converted, layers, inputs),
        parameters_before=attention_parameters(model if is_ours else source),
        parameters_after=attention_parameters(converted),
        total_before=model.num_parameters(),
        total_after=converted.num_parameters(),
        measured_on="weights" if batches is None else "inputs",
        layer_ranks=converted.config.layer_ranks,
        dictionary_groups=groups if dictionary_groups > 1 else None,
    )
    return converted, report


def _new_config(
    old: SharedAttentionConfig, attention_scheme: str, depth_sharing: str, config_fields: dict
) -> SharedAttentionConfig:
    for name, value in config_fields.items():
        if name not in _CONFIG_FIELDS:
            raise ValueError(f"{name}={value!r} is not an option of from_stock; valid are {', '.join(_CONFIG_FIELDS)}")
    return old.with_attention(attention_scheme=attention_scheme, depth_sharing=depth_sharing, **config_fields)


def _check_finite(layers: list[DenseAttention]):
    for i, layer in enumerate(layers):
        roles = (layer.query, layer.key, layer.value, layer.output)
        if not all(tensor.isfinite().all() for role in roles for tensor in (role.weight, role.bias)):
            raise ValueError(f"the attention of layer {i} has weights that are NaN or infinite")


def _separate_model(
    source: PreTrainedModel, config: SharedAttentionConfig, layers: list[SchemeLayer]
) -> PreTrainedModel:
    """Return the model of the new scheme whose layers share nothing yet."""
    scheme = {field: getattr(config, field) for field in _SCHEME_FIELDS}
    model = build_like(type(source), config.with_attention(**scheme), source)
    copy_common(source, model)
    for attention, layer in zip(attention_layers(model), layers, strict=True):
        _write_layer(attention, layer)
    return model


def _write_layer(attention: SelfAttention, layer: SchemeLayer):
    matrices = [layer.matrices[name] for name in attention.scheme.matrices]
    _write_linear(attention.projection, torch.cat([m.weight for m in matrices]), torch.cat([m.bias for m in matrices]))
    _write_linear(attention.output, layer.matrices["o"].weight, layer.matrices["o"].bias)
    for name, values in layer.ingredient.items():
        getattr(attention, name).copy_(values)


def _write_linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor):
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def _errors(
    old: list[DenseAttention], converted: PreTrainedModel, layers: list[SchemeLayer], inputs: list[torch.Tensor | None]
) -> list[dict[str, float]]:
    head_dim = converted.config.hidden_size // converted.config.num_attention_heads
    roots = [None if seen is None else Metric.of(seen).root for seen in inputs]
    return [
        layer_errors(before, after, head_dim, layer.head_order, root)
        for before, after, layer, root in zip(old, dense_layers(converted), layers, roots, strict=True)
    ]
