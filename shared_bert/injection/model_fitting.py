"""A whole stock model fitted: first its scheme, then what its layers share."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..conversion.depth_fitting import (
    DictionaryGroups,
    copy_common,
    dictionary_groups_of,
    spread_ranks,
    write_low_rank,
)
from ..conversion.fitting import Metric
from .aligning import (
    aligned,
    attention_module,
    is_rotary,
    stack_layers,
    stacks_to_align,
    why_logits_are_fixed,
    write_layer,
)
from .calibration import autocorrelations, drift
from .fitting import fit_depth, fit_roles, read_affine
from .roles import ROLES
from .sharing_config import SharingConfig
from .swap import inject, row_parts
from .targets import is_cross_attention, layer_names, linear_maps

Batches = list[Mapping[str, torch.Tensor]]


def with_scheme(model: PreTrainedModel, config: SharingConfig, batches: Batches | None) -> PreTrainedModel:
    """Return a copy of the model with the scheme fitted, whose layers share nothing yet.

    Raises:
        ValueError: no fit of the scheme to such a model is known.
    """
    base = model.base_model
    stacks = [stack for stack in config.attention if not is_cross_attention(stack["output"])]
    for stack in stacks:
        reason = why_logits_are_fixed(attention_module(base, stack), base.config)
        if reason is not None and config.attention_scheme != "value_free":
            raise ValueError(
                f"attention_scheme={config.attention_scheme!r} cannot be fitted to a {base.config.model_type}, which "
                f"{reason}: start new matrices with initialize=True"
            )
    result = copy.deepcopy(model)
    inject(result, replace(config, depth_sharing="none", targets=[]))
    for stack in stacks:
        layers = stack_layers(base, stack)
        queries = [names["query"] for names in layers]
        inputs = {} if batches is None else autocorrelations(model, queries, batches)
        for names in layers:
            affines = {role: read_affine(base.get_submodule(name)) for role, name in names.items()}
            fit = fit_roles(
                [affines[role] for role in ROLES],
                affines["output"],
                config.attention_scheme,
                stack["heads"],
                inputs.get(names["query"]),
                is_rotary(attention_module(base, stack)),
            )
            write_layer(result.base_model, names, config.scheme, fit)
    return result


class DepthFit:
    """What the layers of a model share, fitted to its matrices.

    Attributes:
        separate: the model, its heads moved if they are aligned.
        fits: by target.
        groups: of dictionaries, by the name of the list of layers.
        aligned: the queries' patterns of the attention whose heads were moved.
    """

    def __init__(
        self,
        separate: PreTrainedModel,
        config: SharingConfig,
        batches: Batches | None,
        dictionary_groups: int,
        align: bool,
    ):
        self.separate, self.config, self.batches = separate, config, batches
        base = separate.base_model
        maps = linear_maps(base)
        self.names = {target: layer_names(maps, target) for target in config.targets}
        self.groups = self._dictionary_groups(dictionary_groups)
        self.inputs = self._inputs(self.names)
        outputs = {stack["output"] for stack in config.attention}
        self.aligned = [stack["query"] for stack, _ in stacks_to_align(base, config)] if align else []
        if self.aligned:
            self.separate = aligned(separate, config, self.groups, self.inputs)
            self.inputs |= self._inputs(outputs & self.names.keys())  # which read the heads
        maps = linear_maps(self.separate.base_model)
        readers = {stack[role] for stack in config.attention for role in ("fused", *ROLES) if role in stack}
        self.weights, self.fits = {}, {}
        for target, names in self.names.items():
            weights = self.weights[target] = [read_affine(maps[name]).weight for name in names]
            widths, heads = row_parts(maps, config, target)
            out_features, in_features = weights[0].shape
            reads_stream = target in readers or (target not in outputs and in_features <= out_features)
            groups = self.groups[target.split(".*.")[0]]
            self.fits[target] = fit_depth(
                weights, config, widths, heads, groups, self.inputs.get(target), reads_stream
            )

    def _dictionary_groups(self, number: int) -> dict[str, DictionaryGroups]:
        found = {}
        for target, names in self.names.items():
            layers = target.split(".*.")[0]
            if layers not in found:
                moved = []
                if number > 1:
                    numbers = [name[len(layers) + 1 :].split(".")[0] for name in names]
                    moved = drift(self.separate, [f"{layers}.{number}" for number in numbers], self.batches)
                found[layers] = dictionary_groups_of(len(names), self.config.num_atoms, number, moved)
        return found

    def _inputs(self, targets: Collection[str]) -> dict[str, list[torch.Tensor]]:
        """Return the autocorrelation of the inputs of every layer, by target."""
        if self.batches is None or not targets:
            return {}
        every = [name for target in targets for name in self.names[target]]
        found = autocorrelations(self.separate, every, self.batches)
        return {target: [found[name] for name in self.names[target]] for target in targets}

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
                if shared_map.bias is not None:
                    shared_map.bias.copy_(read_affine(self.separate.base_model.get_submodule(name)).bias)
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
