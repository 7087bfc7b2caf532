"""`from_stock`: a trained stock model, or one of this package, under another scheme and depth sharing."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling import SelfAttention, SharedAttentionConfig
from ..modeling.loading import check_loaded
from ..modeling.projections import LowRankLinear
from .calibration import Calibration, calibrate
from .dense import SchemeLayer, attention_layers, dense_layers, depth_sharing_of, scheme_layers
from .depth_fitting import Blocks, align_layers, can_align, check_scipy, fit_atoms, low_rank_factors, spread_ranks
from .families import STOCK_CLASSES
from .fitting import FITS, Metric, fit_scheme
from .report import ConversionReport, attention_parameters, layer_errors
from .stock import build_like, read_stock, standard_config, to_stock

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
    """Converts a stock BERT or GPT-2, of any head of `STOCK_CLASSES`, or a model of this package.

    The scheme is fitted first (see `fitting`), then the depth sharing (see `depth_fitting`), both without training.
    What the new model can express does not change: with as many atoms as layers, with the full rank, or where the
    model has the scheme already, its outputs are those of the old one. So they are where it has the scheme and the
    depth sharing with its sizes, but for a rank besides shared matrices, which is fitted after them.

    Args:
        calibration: batches of the model's inputs (`input_ids`, and `attention_mask` or `document_ids`). With them,
            schemes and low ranks are fitted to what the matrices are given, and not to the matrices alone.
        align: turn and reorder heads, attention unchanged, before layers share matrices.
        dictionary_groups: split the dictionary of ``masa`` into so many groups of consecutive layers, between the
            layers whose outputs drift most on the calibration text.
        spread_rank: spread the parameters that `rank` takes in every matrix over those that need them most.
        **config_fields: the new config's num_atoms, num_groups, rank, layer_ranks, depth_shared_matrices,
            num_key_value_heads and attention_scale.

    Returns:
        The converted model, in the dtype, on the device and in the mode of the old one, and what it lost.

    Raises:
        ValueError: an architecture or a head that is not known, a config that has no meaning, or no calibration text
            where it is needed; before any weight is touched. Weights that are not finite.
        ImportError: the layers are to be aligned, and scipy is not installed.
    """
    for name, value in config_fields.items():
        if name not in _CONFIG_FIELDS:
            raise ValueError(f"{name}={value!r} is no option of from_stock; it takes {', '.join(_CONFIG_FIELDS)}")
    is_ours = type(model) in STOCK_CLASSES
    stated = model.config if is_ours else standard_config(model)
    config = stated.with_attention(attention_scheme=attention_scheme, depth_sharing=depth_sharing, **config_fields)
    _check(config, calibration is not None, dictionary_groups, spread_rank)
    if align and can_align(config):
        check_scipy()
    check_loaded(model)
    of_scheme = {f: getattr(config, f) for f in ("attention_scheme", "num_key_value_heads", "attention_scale")}
    has_scheme = all(getattr(stated, field) == value for field, value in of_scheme.items())
    if not has_scheme and attention_scheme not in FITS:
        raise ValueError(f"{attention_scheme=} cannot be fitted; from_stock takes {', '.join(FITS)}")
    source = read_stock(to_stock(model) if is_ours else model)
    batches = None if calibration is None else list(calibration)
    measured = None if batches is None else calibrate(source, batches)

    old = dense_layers(source)
    for i, layer in enumerate(old):
        if not all(role.weight.isfinite().all() for role in (layer.query, layer.key, layer.value, layer.output)):
            raise ValueError(f"the attention of layer {i} has weights that are infinite or no numbers")
    inputs = [None] * len(old) if measured is None else measured.inputs
    if has_scheme:
        layers = scheme_layers(model if is_ours else source)  # a scheme has many bases; this is the model's own
    else:
        layers = [fit_scheme(layer, config, seen) for layer, seen in zip(old, inputs, strict=True)]
    blocks = _blocks(config.num_atoms, dictionary_groups, measured, len(old))
    root = None if measured is None else Metric.of(torch.stack(measured.inputs).mean(0)).root
    if align:
        layers = align_layers(layers, config, blocks, root)

    # The scheme by itself, in the model whose matrices are shared or factored next.
    converted = build_like(type(source), config.with_attention(**of_scheme), source)
    _copy_common(source, converted)
    for attention, layer in zip(attention_layers(converted), layers, strict=True):
        _write_layer(attention, layer)
    if depth_sharing != "none":
        has_ranks = config.rank or config.layer_ranks
        measured = calibrate(converted, batches) if batches is not None and has_ranks else None
        converted = _share_depth(converted, config, layers, blocks, root, measured, spread_rank)

    head_dim = config.hidden_size // config.num_attention_heads
    roots = [None if seen is None else Metric.of(seen).root for seen in inputs]
    errors = [
        layer_errors(before, after, head_dim, layer.head_order, root)
        for before, after, layer, root in zip(old, dense_layers(converted), layers, roots, strict=True)
    ]
    report = ConversionReport(
        attention_scheme,
        depth_sharing,
        errors,
        parameters_before=attention_parameters(model if is_ours else source),
        parameters_after=attention_parameters(converted),
        total_before=model.num_parameters(),
        total_after=converted.num_parameters(),
        measured_on="weights" if batches is None else "inputs",
        layer_ranks=converted.config.layer_ranks,
        dictionary_groups=blocks if dictionary_groups > 1 else None,
    )
    return converted, report


def _check(config: SharedAttentionConfig, has_text: bool, dictionary_groups: int, spread_rank: bool):
    if dictionary_groups != 1 and config.depth_sharing != "masa":
        raise ValueError(
            f"dictionary_groups={dictionary_groups} splits the dictionary of depth_sharing='masa', not of "
            f"{config.depth_sharing!r}"
        )
    if not 1 <= dictionary_groups <= (config.num_atoms or 1):
        raise ValueError(
            f"dictionary_groups={dictionary_groups} must be at least 1 and at most num_atoms={config.num_atoms}"
        )
    if dictionary_groups > 1 and not has_text:
        raise ValueError(f"dictionary_groups={dictionary_groups} are found on text: give calibration")
    if spread_rank and config.rank is None:
        raise ValueError("spread_rank=True spreads the parameters of a rank: give rank")


def _blocks(num_atoms: int | None, groups: int, measured: Calibration | None, num_layers: int) -> Blocks:
    """Cuts the stack where the drift is largest, and gives each part atoms by its number of layers."""
    if groups == 1:
        return [(0, num_layers, num_atoms)]
    cuts = sorted(sorted(range(1, num_layers), key=lambda layer: -measured.drift[layer])[: groups - 1])
    sizes = [after - before for before, after in zip([0, *cuts], [*cuts, num_layers], strict=True)]
    atoms = [1] * groups
    for _ in range(num_atoms - groups):
        neediest = max(range(groups), key=lambda g: (sizes[g] - atoms[g]) / atoms[g])
        atoms[neediest] += 1
    return [(start, start + size, n) for start, size, n in zip([0, *cuts], sizes, atoms, strict=True)]


def _copy_common(source: PreTrainedModel, target: PreTrainedModel):
    """Copies what both models have in the same form: all that is outside attention, and a layer's own vectors."""
    target_state = target.state_dict()
    for name, tensor in source.state_dict().items():
        if name in target_state and target_state[name].shape == tensor.shape:
            target_state[name].copy_(tensor)


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


def _share_depth(
    separate: PreTrainedModel,
    config: SharedAttentionConfig,
    layers: list[SchemeLayer],
    blocks: Blocks,
    root: torch.Tensor | None,
    measured: Calibration | None,
    spread_rank: bool,
) -> PreTrainedModel:
    """Puts the matrices of `separate`, which are those of `layers`, into a model that shares or factors them."""
    names = {linear: list(config.matrix_widths(linear)) for linear in config.shared_maps}
    remainders = {
        name: torch.stack([layer.matrices[name].weight for layer in layers])
        for group in names.values()
        for name in group
    }
    fits = {}
    if config.depth_sharing != "low_rank":
        fits = {
            name: fit_atoms(stack, config, blocks, None if name == "o" else root) for name, stack in remainders.items()
        }
        for name, (atoms, coefficients) in fits.items():
            remainders[name] = remainders[name] - torch.einsum("ls,swd->lwd", coefficients, atoms)

    factors = {}
    if config.rank or config.layer_ranks:
        for linear, group in names.items():
            seen = [None] * len(layers)
            if measured is not None:
                seen = measured.inputs if linear == "projection" else measured.contexts
            for name in group:
                whole = [layer.matrices[name].weight for layer in layers]
                factors[name] = [low_rank_factors(*of) for of in zip(remainders[name], whole, seen, strict=True)]
    if spread_rank:
        widths = [width for linear in names for width in config.matrix_widths(linear).values()]
        gains = [[factors[name][i][0] for name in remainders] for i in range(len(layers))]
        ranks = spread_ranks(gains, config.rank, [width + config.hidden_size for width in widths])
        config = type(config).from_dict({**config.to_dict(), "rank": None, "layer_ranks": ranks})

    model = build_like(type(separate), config, separate)
    _copy_common(separate, model)
    for name, (atoms, coefficients) in fits.items():
        shared = depth_sharing_of(model)[name]
        shared.atoms.copy_(atoms)
        if config.depth_sharing == "masa":
            shared.coefficients.copy_(coefficients)
    for i, attention in enumerate(attention_layers(model)):
        for linear, group in names.items():
            module = getattr(attention, linear)
            module = module if config.depth_sharing == "low_rank" else module.residual
            if module is not None:
                _write_low_rank(module, [factors[name][i][1:] for name in group])
    return model


def _write_low_rank(module: LowRankLinear, factors: list[tuple[torch.Tensor, torch.Tensor]]):
    for parameter, down_rows, (up, down) in zip(module.up, module.down.split(module.ranks), factors, strict=True):
        kept = min(parameter.shape[1], up.shape[1])  # a rank above the width of grouped keys leaves zeros
        parameter.zero_()[:, :kept].copy_(up[:, :kept])
        down_rows.zero_()[:kept].copy_(down[:kept])
