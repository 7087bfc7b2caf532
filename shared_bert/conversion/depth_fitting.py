"""The nearest matrices of a depth sharing to those of separate layers.

- ``masa``: matrix PCA, one dictionary for each matrix (Zhussip et al., arXiv 2508.04581): the atoms are the leading
  principal components of the layers' matrices and the coefficients their inner products, both from the eigenvectors
  of the layers × layers Gram matrix (of W·C^½, where the inputs' autocorrelation C is known). A dictionary may be
  split into groups of consecutive layers, each with atoms of its own (whose coefficients in other layers are zero).
- ``sequential``, ``repeat_all_over``: the mean of each group's matrices.
- ``low_rank``, and what layers add to shared matrices: the singular value decomposition, weighted by the inputs'
  autocorrelation where it is known, which minimises ‖(W - W')·C^½‖.
"""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from ..modeling import SharedAttentionConfig
from ..modeling.depth_sharing import layer_groups
from ..modeling.projections import LowRankLinear
from .calibration import Calibration
from .dense import SchemeLayer, attention_layers, depth_sharing_of
from .fitting import Metric
from .stock import build_like

DictionaryGroups = list[tuple[int, int, int]]  # first layer, layer after the last, atoms
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # see `low_rank_factors`


class DepthSharingFields(Protocol):
    """What fitting asks of a config: the kind of sharing, and the number of groups in two of them."""

    depth_sharing: str
    num_groups: int | None


def layer_coefficients(flat: torch.Tensor, config: DepthSharingFields, groups: DictionaryGroups) -> torch.Tensor:
    """Return the share of each shared matrix in every layer's, [layers, shared matrices].

    Args:
        flat: the matrices of all layers, [layers, entries].
        groups: of ``masa``'s dictionary. In the other sharings each layer takes one matrix.
    """
    if config.depth_sharing == "masa":
        gram = flat @ flat.T
        parts = [torch.linalg.eigh(gram[a:b, a:b]).eigenvectors[:, -atoms:].flip(1) for a, b, atoms in groups]
        return torch.block_diag(*parts)
    group_of_layer = layer_groups(config.depth_sharing, len(flat), config.num_groups)
    return torch.nn.functional.one_hot(torch.tensor(group_of_layer), config.num_groups).to(flat)


def dictionary_groups_of(num_layers: int, num_atoms: int | None, number: int, drift: list[float]) -> DictionaryGroups:
    """Cut the stack where the drift is largest, and give each part atoms by its number of layers."""
    if number == 1:
        return [(0, num_layers, num_atoms)]
    cuts = sorted(sorted(range(1, num_layers), key=lambda layer: -drift[layer])[: number - 1])
    sizes = [after - before for before, after in zip([0, *cuts], [*cuts, num_layers], strict=True)]
    atoms = [1] * number
    for _ in range(num_atoms - number):
        neediest = max(range(number), key=lambda g: (sizes[g] - atoms[g]) / atoms[g])
        atoms[neediest] += 1
    return [(start, start + size, n) for start, size, n in zip([0, *cuts], sizes, atoms, strict=True)]


def check_fit_options(
    depth_sharing: str,
    num_atoms: int | None,
    rank: int | None,
    has_inputs: bool,
    dictionary_groups: int,
    spread_rank: bool,
):
    """Raise a ValueError for options of a fit that do not go with what is fitted."""
    if dictionary_groups != 1 and depth_sharing != "masa":
        raise ValueError(
            f"dictionary_groups={dictionary_groups} splits the dictionary of depth_sharing='masa', not of "
            f"{depth_sharing!r}"
        )
    if not 1 <= dictionary_groups <= (num_atoms or 1):
        raise ValueError(f"dictionary_groups={dictionary_groups} must be at least 1 and at most num_atoms={num_atoms}")
    if dictionary_groups > 1 and not has_inputs:
        raise ValueError(f"dictionary_groups={dictionary_groups} are chosen on inputs: give calibration")
    if spread_rank and rank is None:
        raise ValueError("spread_rank=True spreads the parameters of a rank: give rank")


def fit_atoms(
    stack: torch.Tensor, config: DepthSharingFields, groups: DictionaryGroups, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit the shared matrices to one matrix of all layers.

    Args:
        stack: [layers, width, hidden].
        groups: see `layer_coefficients`.
        root: of the inputs' autocorrelation, the mean over the layers, [hidden, hidden]; None takes the identity.

    Returns:
        `atoms` [atoms, width, hidden] and `coefficients` [layers, atoms].
    """
    weighted = stack if root is None else stack @ root
    coefficients = layer_coefficients(weighted.flatten(1), config, groups)
    atoms = torch.linalg.pinv(coefficients) @ stack.flatten(1)
    return atoms.unflatten(1, stack.shape[1:]), coefficients


def low_rank_factors(weight: torch.Tensor, whole: torch.Tensor, autocorrelation: torch.Tensor | None) -> Factors:
    """Decompose weight [out, in] so that the leading r columns of `up` and rows of `down` are the best of rank r.

    Args:
        whole: the matrix that `weight` is, or is the remainder of.
        autocorrelation: of its inputs, [in, in]; None takes the identity.

    Returns:
        The share of the whole matrix's squared norm (on its inputs) that each rank adds, [n], `up` [out, n] and
        `down` [n, in].
    """
    if autocorrelation is None:
        left, values, down = torch.linalg.svd(weight, full_matrices=False)
        size = whole.square().sum()
    else:
        metric = Metric.of(autocorrelation)
        left, values, down = torch.linalg.svd(weight @ metric.root, full_matrices=False)
        down, size = down @ metric.inverse, (whole @ metric.root).square().sum()
    root = values.sqrt()
    return values.square() / size.clamp(min=1e-30), left * root, root[:, None] * down


def spread_ranks(gains: list[list[torch.Tensor]], rank: int, costs: list[int]) -> list[list[int]]:
    """Spread the parameters that `rank` takes in every matrix over the matrices that gain most by them.

    Args:
        gains: [layers][matrices], what each rank of a matrix adds, the largest first.
        costs: parameters of one rank of each matrix.
    """
    budget = rank * sum(costs) * len(gains)
    ranks = [[0] * len(costs) for _ in gains]
    offers = [
        (float(gain) / costs[matrix], layer, matrix)
        for layer, row in enumerate(gains)
        for matrix, values in enumerate(row)
        for gain in values
    ]
    for _, layer, matrix in sorted(offers, reverse=True):
        if costs[matrix] <= budget:
            ranks[layer][matrix] += 1
            budget -= costs[matrix]
    return ranks


def share_depth(
    separate: PreTrainedModel,
    config: SharedAttentionConfig,
    layers: list[SchemeLayer],
    groups: DictionaryGroups,
    root: torch.Tensor | None,
    measured: Calibration | None,
    spread_rank: bool,
) -> PreTrainedModel:
    """Return a model that shares or factors the matrices of `separate`, which are those of `layers`.

    Args:
        groups, root: see `fit_atoms`.
        measured: on `separate`, for low-rank matrices; None takes the weights alone.
        spread_rank: see `from_stock`.
    """
    remainders = {
        name: torch.stack([layer.matrices[name].weight for layer in layers]) for name in config.shared_widths
    }
    fits = {}
    if config.depth_sharing != "low_rank":
        for name, stack in remainders.items():
            atoms, coefficients = fits[name] = fit_atoms(stack, config, groups, None if name == "o" else root)
            remainders[name] = stack - torch.einsum("ls,swd->lwd", coefficients, atoms)
    factors = {}
    if config.rank or config.layer_ranks:
        factors = {name: _factors(name, remainders[name], layers, measured) for name in remainders}
    if spread_rank:
        config = _with_spread_ranks(config, factors)
    model = build_like(type(separate), config, separate)
    copy_common(separate, model)
    for name, (atoms, coefficients) in fits.items():
        shared = depth_sharing_of(model)[name]
        shared.atoms.copy_(atoms)
        if config.depth_sharing == "masa":
            shared.coefficients.copy_(coefficients)
    if factors:
        _write_factors(model, factors)
    return model


def copy_common(source: PreTrainedModel, target: PreTrainedModel):
    """Copy the tensors that both models have in the same shape: all outside attention, and a layer's own vectors."""
    target_state = target.state_dict()
    for name, tensor in source.state_dict().items():
        if name in target_state and target_state[name].shape == tensor.shape:
            target_state[name].copy_(tensor)


def _factors(
    name: str, remainder: torch.Tensor, layers: list[SchemeLayer], measured: Calibration | None
) -> list[Factors]:
    """Return the factors of one matrix's remainder [layers, width, hidden] in every layer."""
    inputs = [None] * len(layers)
    if measured is not None:
        inputs = measured.contexts if name == "o" else measured.inputs
    whole = [layer.matrices[name].weight for layer in layers]
    return [low_rank_factors(*of_layer) for of_layer in zip(remainder, whole, inputs, strict=True)]


def _with_spread_ranks(config: SharedAttentionConfig, factors: dict[str, list[Factors]]) -> SharedAttentionConfig:
    gains = [[factors[name][layer][0] for name in config.shared_widths] for layer in range(config.num_hidden_layers)]
    costs = [width + config.hidden_size for width in config.shared_widths.values()]
    ranks = spread_ranks(gains, config.rank, costs)
    return type(config).from_dict({**config.to_dict(), "rank": None, "layer_ranks": ranks})


def _write_factors(model: PreTrainedModel, factors: dict[str, list[Factors]]):
    config = model.config
    for layer, attention in enumerate(attention_layers(model)):
        for map_name in config.shared_maps:
            module = getattr(attention, map_name)
            if config.depth_sharing != "low_rank":
                module = module.residual
            if module is not None:
                write_low_rank(module, [factors[name][layer] for name in config.matrix_widths(map_name)])


def write_low_rank(module: LowRankLinear, factors: list[Factors]):
    """Copy the leading ranks of each matrix's factors into a module."""
    for parameter, down_rows, (_, up, down) in zip(module.up, module.down.split(module.ranks), factors, strict=True):
        kept = min(parameter.shape[1], up.shape[1])  # a rank above the width of grouped keys leaves zeros
        parameter.zero_()[:, :kept].copy_(up[:, :kept])
        down_rows.zero_()[:kept].copy_(down[:kept])
