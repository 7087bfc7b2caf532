"""A whole stock model fitted: first its scheme, then what its layers share."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..conversion.depth_fitting import copy_common, dictionary_groups_of, spread_ranks, write_low_rank
from ..conversion.fitting import Metric
from .calibration import autocorrelations, drift
from .fitting import fit_depth, fit_roles, read_affine, write_affine
from .roles import ROLES
from .sharing_config import SharingConfig
from .swap import inject, row_parts
from .targets import is_cross_attention, layer_names, linear_maps

Batches = list[Mapping[str, torch.Tensor]]


def with_scheme(model: PreTrainedModel, config: SharingConfig, batches: Batches | None) -> PreTrainedModel:
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


class DepthFit:
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
