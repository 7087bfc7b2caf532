"""The nearest matrices of a depth sharing to those of separate layers.

- ``masa``: matrix PCA, one dictionary for each matrix (Zhussip et al., arXiv 2508.04581): the atoms are the leading
  principal components of the layers' matrices and the coefficients their inner products, both from the eigenvectors
  of the layers × layers Gram matrix (of W·C^½, where the inputs' autocorrelation C is known). A dictionary may be
  split into groups of consecutive layers, each with atoms of its own (whose coefficients in other layers are zero).
- ``sequential``, ``repeat_all_over``: the mean of each group's matrices.
- ``low_rank``, and what layers add to shared matrices: the singular value decomposition, weighted by the inputs'
  autocorrelation where it is known, which minimises ‖(W - W')·C^½‖.

What the paper does not do: `align_layers` first uses the freedom of attention to bring the layers closer to one
another. The heads of a layer may stand in any order, and the query and key of a head, or its value and output, may be
rotated together. It alternates between fitting the shared matrices and turning every layer towards its fit
(orthogonal Procrustes; the heads' order by the assignment with the largest gain), so the squared error only falls.
"""

from dataclasses import replace

import torch

from ..modeling import Scheme, SharedAttentionConfig
from ..modeling.depth_sharing import layer_groups
from .dense import Affine
from .fitting import FittedLayer, Metric, nearest_rotation

_MAX_ITERATIONS = 100
_LEAST_GAIN = 1e-4  # of what the shared matrices hold, in one iteration

Blocks = list[tuple[int, int, int]]  # first layer, layer after the last, atoms


def fit_atoms(
    stack: torch.Tensor, config: SharedAttentionConfig, blocks: Blocks, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits the shared matrices to one matrix of all layers.

    Args:
        stack: [layers, width, hidden].
        blocks: the groups of ``masa``'s dictionary.
        root: of the inputs' autocorrelation, the mean over the layers, [hidden, hidden]; None takes the identity.

    Returns:
        `atoms` [atoms, width, hidden] and `coefficients` [layers, atoms]: where groups share a mean, ones and zeros.
    """
    flat = stack.flatten(1)
    if config.depth_sharing == "masa":
        weighed = flat if root is None else (stack @ root).flatten(1)
        gram = weighed @ weighed.T
        parts = [torch.linalg.eigh(gram[a:b, a:b]).eigenvectors[:, -atoms:].flip(1) for a, b, atoms in blocks]
        coefficients = torch.block_diag(*parts)
        return (coefficients.T @ flat).unflatten(1, stack.shape[1:]), coefficients
    groups = layer_groups(config.depth_sharing, len(stack), config.num_groups)
    coefficients = torch.nn.functional.one_hot(torch.tensor(groups), config.num_groups).to(stack)
    return ((coefficients / coefficients.sum(0)).T @ flat).unflatten(1, stack.shape[1:]), coefficients


def low_rank_factors(
    weight: torch.Tensor, whole: torch.Tensor, autocorrelation: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decomposes weight [out, in], of which the leading r columns of `up` and rows of `down` are the best of rank r.

    Args:
        whole: the matrix that `weight` is, or is the remainder of.
        autocorrelation: of its inputs, [in, in]; None takes the identity.

    Returns:
        How much of the whole matrix' size (on its inputs) each rank adds, [n], `up` [out, n] and `down` [n, in].
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
    """Spreads the parameters that `rank` takes in every matrix over the matrices that gain most by them.

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


def turning_together(scheme: Scheme) -> list[tuple[str, ...]]:
    """Names the matrices of a head that one rotation may turn without a change of attention ("o" backwards)."""
    if scheme.diagonals:
        return []  # each channel has its own weight
    if scheme.key_is_value:
        groups = [(scheme.query, scheme.key, "o")]
    else:
        groups = [(scheme.query, scheme.key), (scheme.value, "o")]
    return [tuple(dict.fromkeys(group)) for group in groups if "x" not in group]


def align_layers(
    layers: list[FittedLayer], config: SharedAttentionConfig, blocks: Blocks, root: torch.Tensor | None = None
) -> list[FittedLayer]:
    """Turns and reorders the heads of each layer, attention unchanged, so that shared matrices fit the layers better.

    Grouped heads, and layers that share no matrices, stay as they are.
    """
    if config.depth_sharing in ("none", "low_rank") or config.num_key_value_heads != config.num_attention_heads:
        return layers
    names = [name for linear in config.shared_maps for name in config.matrix_widths(linear)]
    # Matrices count by the share of them that is explained; only those that are given the layer's input are weighed.
    sizes = {name: sum(layer.matrices[name].weight.square().sum() for layer in layers).sqrt() for name in names}

    def by_head(name: str, weight: torch.Tensor) -> torch.Tensor:  # [heads, hidden, head_dim]
        rows = weight if name == "o" else weight.T if root is None else root @ weight.T
        return rows.unflatten(1, (config.num_attention_heads, -1)).transpose(0, 1) / sizes[name]

    held = 0.0
    for _ in range(_MAX_ITERATIONS):
        fits = {}
        for name in names:
            stack = torch.stack([layer.matrices[name].weight for layer in layers])
            atoms, coefficients = fit_atoms(stack, config, blocks, None if name == "o" else root)
            fits[name] = torch.einsum("ls,swd->lwd", coefficients, atoms)
        targets = [{name: by_head(name, fit[i]) for name, fit in fits.items()} for i in range(len(layers))]
        before, held = held, float(sum(heads.square().sum() for target in targets for heads in target.values()))
        if held - before < _LEAST_GAIN * held:
            break
        layers = [_turn(layer, target, config, by_head) for layer, target in zip(layers, targets, strict=True)]
    return layers


def _turn(layer: FittedLayer, target: dict[str, torch.Tensor], config: SharedAttentionConfig, by_head) -> FittedLayer:
    """Brings a layer closest to `target`, by the order of its heads and by rotations within them."""
    heads, scheme = config.num_attention_heads, config.scheme
    groups = [
        (group, [name for name in group if name in target])
        for group in turning_together(scheme)
        if any(name in target for name in group)
    ]
    turning = {name for group, _ in groups for name in group}

    def side_by_side(names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.cat([by_head(name, layer.matrices[name].weight) for name in names], dim=1)
        return own, torch.cat([target[name] for name in names], dim=1)

    if "x" not in (scheme.query, scheme.key, scheme.value):
        # What heads gain in each other's place: their inner product, after the best rotation where one is free.
        gain = torch.zeros(heads, heads, dtype=torch.float64)
        for _, names in groups:
            own, wanted = side_by_side(names)
            gain += torch.linalg.svdvals(own.mT[:, None] @ wanted).sum(-1).cpu()
        for name in target.keys() - turning:
            gain += torch.einsum("hij,gij->hg", *side_by_side([name])).cpu()
        layer = _reorder(layer, _best_order(gain), heads)

    matrices, pairwise = dict(layer.matrices), layer.pairwise
    for group, names in groups:
        rotation = nearest_rotation(*side_by_side(names))
        for name in group:
            weight, bias = matrices[name].weight, matrices[name].bias
            if name == "o":
                weight = (weight.unflatten(1, (heads, -1)).transpose(0, 1) @ rotation).transpose(0, 1).flatten(1)
            else:
                weight = (rotation.mT @ weight.unflatten(0, (heads, -1))).flatten(0, 1)
                bias = (bias.unflatten(0, (heads, 1, -1)) @ rotation).flatten()
            matrices[name] = Affine(weight, bias)
        if scheme.pairwise and scheme.query in group:
            pairwise = rotation.mT @ pairwise @ rotation
    return replace(layer, matrices=matrices, pairwise=pairwise)


def _best_order(gain: torch.Tensor) -> torch.Tensor:
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ImportError("aligning the layers needs scipy: pip install 'shared_bert[convert]'") from error
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.as_tensor(rows)[torch.as_tensor(columns).argsort()]


def _reorder(layer: FittedLayer, order: torch.Tensor, heads: int) -> FittedLayer:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (heads, -1))[order].flatten(0, 1)

    matrices = {
        name: Affine(rows(affine.weight.T).T, affine.bias)
        if name == "o"
        else Affine(rows(affine.weight), rows(affine.bias))
        for name, affine in layer.matrices.items()
    }
    return FittedLayer(
        matrices,
        None if layer.diagonals is None else torch.stack([rows(diagonal) for diagonal in layer.diagonals]),
        None if layer.pairwise is None else layer.pairwise[order],
        order if layer.head_order is None else layer.head_order[order],
    )
