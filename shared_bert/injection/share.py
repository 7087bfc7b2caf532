"""`share`: a stock model of any architecture whose layers share their matrices."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedModel

from ..conversion.depth_fitting import (
    DictionaryGroups,
    copy_common,
    dictionary_groups_of,
    spread_ranks,
    write_low_rank,
)
from ..conversion.families import STOCK_CLASSES
from ..conversion.fitting import Metric
from ..modeling.loading import check_loaded
from .calibration import autocorrelations, drift
from .fitting import fit_depth, fit_roles, read_affine, write_affine
from .quantizer import SharingQuantizer, own_modules
from .roles import ROLES, IngredientParameters
from .sharing_config import SharingConfig
from .swap import inject, row_parts
from .targets import find_attention, find_targets, is_cross_attention, layer_names, linear_maps

_SIZES = ("num_atoms", "num_groups", "rank", "coefficient_source", "coefficient_init")
Batches = list[Mapping[str, torch.Tensor]]


@dataclass
class SharingReport:
    """The result of `share`; `str()` formats it as a table.

    Attributes:
        attention_scheme, depth_sharing: of the model.
        errors: for each target the relative error ‖W' - W‖ / ‖W‖ of every layer's matrix, on its inputs where
            calibration batches were given; empty for a model that is to be trained.
        parameters_before, parameters_after: of the targets, and of what takes their place.
        total_before, total_after: of the whole model.
        layer_ranks: the rank of each target's factors in every layer, where they were spread.
        dictionary_groups: first layer, layer after the last and atoms of each group of a stack's dictionaries, by the
            name of the stack's layers.
    """

    attention_scheme: str
    depth_sharing: str
    errors: dict[str, list[float]]
    parameters_before: int
    parameters_after: int
    total_before: int
    total_after: int
    layer_ranks: dict[str, list[int]] | None = None
    dictionary_groups: dict[str, DictionaryGroups] | None = None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.attention_scheme}, depth sharing {self.depth_sharing}"]
        for target, errors in self.errors.items():
            lines.append(f"{target}: relative errors " + " ".join(f"{error:.3f}" for error in errors))
        for name in ("dictionary_groups", "layer_ranks"):
            if getattr(self, name):
                lines += [f"{name} of {key}: {value}" for key, value in getattr(self, name).items()]
        for name, before, after in (
            ("matrices", self.parameters_before, self.parameters_after),
            ("model", self.total_before, self.total_after),
        ):
            share = 1 - after / before
            lines.append(
                f"parameters of the {name}: {before:,} → {after:,} "
                f"({abs(share):.1%} {'fewer' if share >= 0 else 'more'})"
            )
        return "\n".join(lines)


@torch.no_grad()
def share(
    model: PreTrainedModel,
    attention_scheme: str = "standard",
    depth_sharing: str = "none",
    *,
    targets: Iterable[str] | None = None,
    depth_shared_matrices: str = "qkv",
    calibration: Iterable[Mapping[str, torch.Tensor]] | None = None,
    initialize: bool = False,
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
        dictionary_groups, spread_rank: see `from_stock`.
        pairwise_init, diagonal_init_std: how `initialize` starts a scheme's ingredient (see `SharedAttentionConfig`).
        **sizes: num_atoms, num_groups, rank, coefficient_source and coefficient_init (see `SharedAttentionConfig`).

    Returns:
        The new model, in the dtype, on the device and in the mode of the old one, and what it lost.

    Raises:
        ValueError: a model that is quantized or shares already, names that fit nothing, shapes that cannot share,
            invalid sizes, or calibration inputs that do not fit.
    """
    _check_model(model)
    if unknown := sorted(sizes.keys() - set(_SIZES)):
        raise ValueError(f"{', '.join(unknown)}: no option of share; valid are {', '.join(_SIZES)}")
    config = SharingConfig(attention_scheme=attention_scheme, depth_sharing=depth_sharing, **sizes)
    _set_targets(config, model.base_model, targets, depth_shared_matrices)
    _check_options(config, calibration is not None, initialize, dictionary_groups, spread_rank)
    _check_ties(model, config)
    result = copy.deepcopy(model)
    inject(result, config)  # what cannot share is refused here, before any fitting

    errors, groups = {}, {}
    if initialize:
        _initialize(model.base_model, result, config, pairwise_init, diagonal_init_std)
    else:
        batches = None if calibration is None else list(calibration)
        separate = model if attention_scheme == "standard" else _with_scheme(model, config, batches)
        if depth_sharing == "none":
            result = separate
        else:
            depth = _Depth(separate, config, batches, dictionary_groups)
            if spread_rank:
                config = depth.spread()
                result = copy.deepcopy(model)
                inject(result, config)
            depth.write(result)
            errors, groups = depth.errors(result), depth.groups
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
    if dictionary_groups != 1 and (config.depth_sharing != "masa" or initialize):
        raise ValueError(f"dictionary_groups={dictionary_groups} splits a dictionary of 'masa' that is fitted")
    if not 1 <= dictionary_groups <= (config.num_atoms or 1):
        raise ValueError(
            f"dictionary_groups={dictionary_groups} must be at least 1 and at most num_atoms={config.num_atoms}"
        )
    if dictionary_groups > 1 and not has_inputs:
        raise ValueError(f"dictionary_groups={dictionary_groups} are chosen on inputs: give calibration")
    if spread_rank and (config.rank is None or initialize):
        raise ValueError("spread_rank=True spreads the parameters of a rank that is fitted: give rank")
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


def _with_scheme(model: PreTrainedModel, config: SharingConfig, batches: Batches | None) -> PreTrainedModel:
    """Return a copy of the model with the scheme fitted, whose layers share nothing yet."""
    base = model.base_model
    _check_fit(base, config)
    maps = linear_maps(base)
    result = copy.deepcopy(model)
    inject(result, replace(config, depth_sharing="none", targets=[]))
    for stack in config.attention:
        if is_cross_attention(stack["output"]):
            continue
        names = {role: layer_names(maps, stack[role]) for role in (*ROLES, "output")}
        inputs = None if batches is None else autocorrelations(model, names["query"], batches)
        for layer, query in enumerate(names["query"]):
            of_layer = {role: names[role][layer] for role in names}
            affines = {role: read_affine(maps[name]) for role, name in of_layer.items()}
            fit = fit_roles(
                [affines[role] for role in ROLES],
                affines["output"],
                config.attention_scheme,
                stack["heads"],
                None if inputs is None else inputs[query],
                _is_rotary(base),
            )
            for role in ROLES:
                module = result.base_model.get_submodule(of_layer[role])
                if module.map is not None:
                    write_affine(module.map, fit.matrices[getattr(config.scheme, role)])
                if module.ingredient is not None:
                    for name, parameter in module.ingredient().items():
                        parameter.copy_(fit.ingredient[name])
            write_affine(result.base_model.get_submodule(of_layer["output"]), fit.matrices["o"])
    return result


class _Depth:
    """What the layers of a model share, fitted to its matrices.

    Attributes:
        fits: by target.
        groups: of dictionaries, by the name of the list of layers.
    """

    def __init__(
        self, separate: PreTrainedModel, config: SharingConfig, batches: Batches | None, dictionary_groups: int
    ):
        self.separate, self.config = separate, config
        base = separate.base_model
        maps = linear_maps(base)
        self.names = {target: layer_names(maps, target) for target in config.targets}
        self.weights = {
            target: [read_affine(maps[name]).weight for name in names] for target, names in self.names.items()
        }
        self.inputs = self._inputs(batches)
        self.groups, self.fits = {}, {}
        outputs = {stack["output"] for stack in config.attention}
        readers = {stack[role] for stack in config.attention for role in ("fused", *ROLES) if role in stack}
        for target, weights in self.weights.items():
            layers, num_layers = target.split(".*.")[0], len(weights)
            if layers not in self.groups:
                moved = []
                if dictionary_groups > 1:
                    before = target.index("*")
                    numbers = [name[before:].split(".")[0] for name in self.names[target]]
                    moved = drift(separate, [f"{layers}.{number}" for number in numbers], batches)
                self.groups[layers] = dictionary_groups_of(num_layers, config.num_atoms, dictionary_groups, moved)
            widths, heads = row_parts(linear_maps(base), config, target)
            out_features, in_features = weights[0].shape
            reads_stream = target in readers or (target not in outputs and in_features <= out_features)
            self.fits[target] = fit_depth(
                weights, config, widths, heads, self.groups[layers], self.inputs.get(target), reads_stream
            )

    def _inputs(self, batches: Batches | None) -> dict[str, list[torch.Tensor]]:
        """Return the autocorrelation of the inputs of every layer, by target."""
        if batches is None:
            return {}
        source = {target: target for target in self.names}
        for stack in self.config.attention:  # query, key and value read the same, but for attention to other sequences
            if "fused" not in stack and not is_cross_attention(stack["output"]):
                source |= {stack[role]: stack["query"] for role in ROLES if stack[role] in source}
        maps = linear_maps(self.separate.base_model)
        names = {source: layer_names(maps, source) for source in source.values()}
        found = autocorrelations(self.separate, [name for of_source in names.values() for name in of_source], batches)
        return {target: [found[name] for name in names[source[target]]] for target in self.names}

    def spread(self) -> SharingConfig:
        """Return the config with the parameters of `rank` spread over all matrices of all targets."""
        places = [(target, layer) for target, names in self.names.items() for layer in range(len(names))]
        gains = [self.fits[target].factors[layer][0] for target, layer in places]
        costs = [sum(self.weights[target][layer].shape) for target, layer in places]
        (ranks,) = spread_ranks([gains], self.config.rank, costs)
        layer_ranks = {target: [] for target in self.names}
        for (target, _), rank in zip(places, ranks, strict=True):
            layer_ranks[target].append(rank)
        return replace(self.config, rank=None, layer_ranks=layer_ranks)

    def write(self, result: PreTrainedModel):
        """Set the parameters of `result`, which shares as the config says."""
        copy_common(self.separate, result)
        for target, fit in self.fits.items():
            for layer, name in enumerate(self.names[target]):
                shared_map = result.base_model.get_submodule(name).map
                if shared_map.factors is not None:
                    write_low_rank(shared_map.factors, [fit.factors[layer]])
            for matrix, (atoms, coefficients) in zip(shared_map.dictionaries[0], fit.shared, strict=True):
                matrix.atoms.copy_(atoms)
                if self.config.depth_sharing == "masa":
                    matrix.coefficients.copy_(coefficients)

    def errors(self, result: PreTrainedModel) -> dict[str, list[float]]:
        """Return the relative error of every layer's matrix, by target, on the inputs where they are known."""
        errors = {}
        for target, weights in self.weights.items():
            errors[target] = []
            for layer, weight in enumerate(weights):
                lost = read_affine(result.base_model.get_submodule(self.names[target][layer])).weight - weight
                if target in self.inputs:
                    root = Metric.of(self.inputs[target][layer]).root
                    lost, weight = lost @ root, weight @ root
                errors[target].append(float(lost.norm() / weight.norm().clamp(min=1e-30)))
        return errors


def _is_rotary(base: PreTrainedModel) -> bool:
    """Whether queries and keys are rotated by their position."""
    return any("Rotary" in type(module).__name__ for module in base.modules())


def _check_fit(base: PreTrainedModel, config: SharingConfig):
    """Raise a ValueError where no fit of the scheme is known."""
    if config.attention_scheme == "value_free":
        return
    names = {part for name, _ in base.named_modules() for part in name.split(".")}
    partial = (getattr(base.config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    reason = None
    if {"q_norm", "k_norm", "q_layernorm", "query_layernorm"} & names:
        reason = "norms its queries and keys"
    elif hasattr(base.config, "rotary_dim") or partial != 1:
        reason = "rotates a part of each head"
    elif any("Disentangled" in type(module).__name__ for module in base.modules()):
        reason = "uses queries and keys for positions, too"
    if reason is not None:
        raise ValueError(
            f"attention_scheme={config.attention_scheme!r} cannot be fitted to a {base.config.model_type}, which "
            f"{reason}: start new matrices with initialize=True"
        )


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
