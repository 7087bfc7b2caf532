"""`share`: a stock model of any architecture whose layers share their matrices."""

import copy
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.alignment import check_scipy
from ..conversion.depth_fitting import check_fit_options
from ..conversion.families import STOCK_CLASSES
from ..modeling.loading import check_loaded
from .aligning import stacks_to_align
from .model_fitting import DepthFit, with_scheme
from .quantizer import SharingQuantizer, own_modules
from .report import SharingReport
from .roles import ROLES, IngredientParameters
from .sharing_config import SharingConfig
from .swap import inject
from .targets import find_attention, find_targets, is_cross_attention, layer_names, linear_maps

_SIZES = ("num_atoms", "num_groups", "rank", "coefficient_source", "coefficient_init")


@torch.no_grad()
def share(
    model: PreTrainedModel,
    attention_scheme: str = "standard",
    depth_sharing: str = "none",
    *,
    targets: Iterable[str] | str | None = None,
    depth_shared_matrices: str = "qkv",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    initialize: bool = False,
    align: bool = True,
    dictionary_groups: int = 1,
    spread_rank: bool = False,
    pairwise_init: str = "normal",
    diagonal_init_std: float = 0.0,
    **sizes,
) -> tuple[PreTrainedModel, SharingReport]:
    """Return a copy of a stock model whose attention follows a scheme and whose layers share matrices.

    The copy is of the same class, which computes all the rest. `save_pretrained` and `from_pretrained` keep what it
    shares (after `import shared_bert`); `dequantize()` turns it into the stock model of the same outputs.

    Args:
        model: of any architecture whose matrices are `nn.Linear` or `Conv1D`.
        attention_scheme: a key of `schemes.SCHEMES`, for self-attention with separate matrices.
        depth_sharing: "none", "masa", "sequential", "repeat_all_over" or "low_rank".
        targets: the matrices that `depth_sharing` applies to: regular expressions for the ends of their names. By
            default attention's, found by `ATTENTION_NAMES`.
        depth_shared_matrices: without `targets`, "qkv" or "qkvo".
        calibration: batches of the model's inputs, or of packed text (see `calibration_batches`). With them, matrices
            are fitted to their results on these inputs, not alone.
        initialize: start with new random matrices of the old ones' standard deviation, for a model that is to be
            trained from scratch.
        align: rotate and reorder the heads of each layer first, as far as attention stays the same (see `aligning`),
            so that layers lose less by sharing.
        dictionary_groups, spread_rank: see `from_stock`.
        pairwise_init, diagonal_init_std: how `initialize` starts a scheme's ingredient (see `SharedAttentionConfig`).
        **sizes: num_atoms, num_groups, rank, coefficient_source and coefficient_init (see `SharedAttentionConfig`).

    Returns:
        The new model, in the dtype, on the device and in the mode of the old one, and what it lost.

    Raises:
        ValueError: a model that is quantized or shares already, names that fit nothing, shapes that cannot share,
            invalid sizes, or calibration inputs that do not fit.
        ImportError: scipy is missing, which aligning needs.
    """
    _check_model(model)
    if unknown := sorted(sizes.keys() - set(_SIZES)):
        raise ValueError(f"{', '.join(unknown)}: no option of share; valid are {', '.join(_SIZES)}")
    config = SharingConfig(attention_scheme=attention_scheme, depth_sharing=depth_sharing, **sizes)
    targets = [targets] if isinstance(targets, str) else targets
    _set_targets(config, model.base_model, targets, depth_shared_matrices)
    _check_options(config, calibration is not None, initialize, dictionary_groups, spread_rank)
    _check_ties(model, config)
    if not initialize:
        _check_finite(model.base_model, config)
    if align and not initialize and stacks_to_align(model.base_model, config):
        check_scipy()
    result = copy.deepcopy(model)
    inject(result, config)  # what cannot share is refused here, before any fitting

    errors, groups, aligned = {}, {}, []
    if initialize:
        _initialize(model.base_model, result, config, pairwise_init, diagonal_init_std)
    else:
        batches = None if calibration is None else list(calibration)
        separate = model if attention_scheme == "standard" else with_scheme(model, config, batches)
        if depth_sharing == "none":
            result = separate
        else:
            depth = DepthFit(separate, config, batches, dictionary_groups, align)
            if spread_rank:
                config = depth.spread()
                result = copy.deepcopy(model)
                inject(result, config)
            depth.write(result)
            errors, groups, aligned = depth.errors(result), depth.groups, depth.aligned
    quantizer = SharingQuantizer(config)
    result.hf_quantizer, result.is_quantized, result.quantization_method = quantizer, True, config.quant_method
    quantizer.postprocess_model(result)
    names = _replaced(model.base_model, config)
    report = SharingReport(
        attention_scheme,
        depth_sharing,
        errors,
        parameters_before=_parameters(model, names),
        parameters_after=_parameters(result, names),
        total_before=model.num_parameters(),
        total_after=result.num_parameters(),
        layer_ranks=config.layer_ranks,
        dictionary_groups=groups if dictionary_groups > 1 else None,
        aligned=aligned,
    )
    return result, report


def _check_model(model: PreTrainedModel):
    if type(model) in STOCK_CLASSES:
        raise ValueError(f"{type(model).__name__} shares by its own config: convert it with from_stock")
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        raise ValueError(
            "the model shares already: dequantize() it first"
            if method == SharingConfig.quant_method
            else f"the model is quantized by {getattr(method, 'value', method)}: share the model it was made from"
        )
    check_loaded(model)


def _set_targets(
    config: SharingConfig, base: PreTrainedModel, targets: Iterable[str] | None, depth_shared_matrices: str
):
    """Set the attention stacks and the targets of `config`."""
    if depth_shared_matrices not in ("qkv", "qkvo"):
        raise ValueError(f"depth_shared_matrices={depth_shared_matrices!r} must be 'qkv' or 'qkvo'")
    if targets is not None and config.depth_sharing == "none":
        raise ValueError("targets name the matrices of depth_sharing: give it, too")
    try:
        config.attention = find_attention(base)
    except ValueError:
        if targets is None or config.attention_scheme != "standard":
            raise
    fused = [stack["fused"] for stack in config.attention if "fused" in stack]
    if config.attention_scheme != "standard" and fused:
        raise ValueError(
            f"attention_scheme={config.attention_scheme!r} needs separate matrices for query, key and value, and "
            f"{fused[0]} is all of them"
        )
    if config.depth_sharing == "none":
        return
    without_matrix = _without_matrix(config)
    if targets is not None:
        config.targets = find_targets(base, targets)
        if lost := [target for target in config.targets if target in without_matrix]:
            raise ValueError(f"targets: attention_scheme={config.attention_scheme!r} has no matrix {', '.join(lost)}")
        return
    roles = ("fused", *ROLES, "output") if depth_shared_matrices == "qkvo" else ("fused", *ROLES)
    config.targets = [
        stack[role]
        for stack in config.attention
        for role in roles
        if role in stack and stack[role] not in without_matrix
    ]


def _without_matrix(config: SharingConfig) -> set[str]:
    """Return the patterns of the roles that the scheme makes without a matrix of their own."""
    lost = set()
    for stack in config.attention:
        if "fused" in stack or is_cross_attention(stack["output"]):
            continue
        seen = {"x"}
        for role in ROLES:
            matrix = getattr(config.scheme, role)
            if matrix in seen:
                lost.add(stack[role])
            seen.add(matrix)
    return lost


def _check_options(
    config: SharingConfig, has_inputs: bool, initialize: bool, dictionary_groups: int, spread_rank: bool
):
    if config.attention_scheme == "standard" and config.depth_sharing == "none":
        raise ValueError("nothing is shared: give attention_scheme or depth_sharing")
    if initialize and (dictionary_groups != 1 or spread_rank):
        raise ValueError("dictionary_groups and spread_rank are of a fit: omit them, or initialize=True")
    check_fit_options(config.depth_sharing, config.num_atoms, config.rank, has_inputs, dictionary_groups, spread_rank)
    if config.coefficient_source == "network" and not (initialize and config.depth_sharing == "masa"):
        raise ValueError("coefficient_source='network' makes the coefficients of a new 'masa': give initialize=True")
    if initialize and has_inputs:
        raise ValueError("initialize=True starts with random matrices, which calibration does not change: omit one")


def _replaced(base: nn.Module, config: SharingConfig) -> list[str]:
    """Return the names of the linear maps that share, or are changed by the scheme."""
    patterns = dict.fromkeys(config.targets)
    if config.attention_scheme != "standard":
        for stack in config.attention:
            if not is_cross_attention(stack["output"]):
                patterns |= dict.fromkeys(stack[role] for role in ROLES)
    maps = linear_maps(base)
    return [name for pattern in patterns for name in layer_names(maps, pattern)]


def _check_ties(model: PreTrainedModel, config: SharingConfig):
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    base = model.base_model
    for name in _replaced(base, config):
        names = owners[id(base.get_submodule(name).weight)]
        if len(names) > 1:
            raise ValueError(f"{names[0]} and {names[1]} are tied: one parameter cannot be shared a second time")


def _check_finite(base: nn.Module, config: SharingConfig):
    for name in _replaced(base, config):
        if not all(parameter.isfinite().all() for parameter in base.get_submodule(name).parameters()):
            raise ValueError(f"{name} has weights that are NaN or infinite")


def _initialize(
    base: nn.Module, result: PreTrainedModel, config: SharingConfig, pairwise_init: str, diagonal_init_std: float
):
    """Start what is shared with the standard deviation that the architecture gave the matrices it replaces."""
    for target in config.targets:
        names = layer_names(linear_maps(base), target)
        std = float(torch.stack([base.get_submodule(name).weight.float().std() for name in names]).mean())
        for name in names:
            shared_map = result.base_model.get_submodule(name).map
            if shared_map.factors is not None:
                shared_map.factors.init_weights(std)
        for matrix in shared_map.dictionaries[0]:
            matrix.init_weights(std)
    start = SimpleNamespace(pairwise_init=pairwise_init, diagonal_init_std=diagonal_init_std)
    for module in result.modules():
        if isinstance(module, IngredientParameters):
            config.scheme.ingredient.init_weights(module(), start)


def _parameters(model: PreTrainedModel, replaced: list[str]) -> int:
    """Count the parameters of the modules `replaced` and of what they share."""
    base = model.base_model
    modules = [base.get_submodule(name) for name in replaced] + list(own_modules(base).values())
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def replaced_parameters(model: PreTrainedModel, config: SharingConfig) -> tuple[int, int]:
    """Return how many parameters a stock model has where `config` shares, and how many it has there after that.

    The model, which may be on the meta device, shares afterwards.
    """
    names = _replaced(model.base_model, config)
    before = _parameters(model, names)
    inject(model, config)
    return before, _parameters(model, names)
