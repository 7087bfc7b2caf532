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

import importlib.util
from dataclasses import replace

import torch

from ..modeling import Scheme, SharedAttentionConfig
from ..modeling.depth_sharing import layer_groups
from .dense import Affine, SchemeLayer
from .fitting import Metric, nearest_rotation

_MAX_ITERATIONS = 100
_LEAST_GAIN = 1e-4  # of what the shared matrices hold, in one iteration

Blocks = list[tuple[int, int, int]]  # first layer, layer after the last, atoms


def layer_coefficients(flat: torch.Tensor, config: SharedAttentionConfig, blocks: Blocks) -> torch.Tensor:
    """Finds of how much of each shared matrix every layer's is made, [layers, shared matrices].

    Args:
        flat: the matrices of all layers, [layers, entries].
        blocks: the groups of ``masa``'s dictionary. The other sharings have one matrix to each layer.
    """
    if config.depth_sharing == "masa":
        gram = flat @ flat.T
        parts = [torch.linalg.eigh(gram[a:b, a:b]).eigenvectors[:, -atoms:].flip(1) for a, b, atoms in blocks]
        return torch.block_diag(*parts)
    groups = layer_groups(config.depth_sharing, len(flat), config.num_groups)
    return torch.nn.functional.one_hot(torch.tensor(groups), config.num_groups).to(flat)


def fit_atoms(
    stack: torch.Tensor, config: SharedAttentionConfig, blocks: Blocks, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits the shared matrices to one matrix of all layers.

    Args:
        stack: [layers, width, hidden].
        blocks: see `layer_coefficients`.
        root: of the inputs' autocorrelation, the mean over the layers, [hidden, hidden]; None takes the identity.

    Returns:
        `atoms` [atoms, width, hidden] and `coefficients` [layers, atoms].
    """
    weighed = stack if root is None else stack @ root
    coefficients = layer_coefficients(weighed.flatten(1), config, blocks)
    atoms = torch.linalg.pinv(coefficients) @ stack.flatten(1)
    return atoms.unflatten(1, stack.shape[1:]), coefficients


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
    """Name the matrices of a head that one rotation may turn without a change of attention ("o" backwards).

    The query's turns with the key's and the value's with the output's, and so do all that these have in common. The
    input itself cannot be turned, nor what turns with it.
    """
    if not scheme.ingredient.can_turn:
        return []
    first, second = {scheme.query, scheme.key}, {scheme.value, "o"}
    groups = [first | second] if first & second else [first, second]
    in_order = (*scheme.matrices, "o")
    return [tuple(name for name in in_order if name in group) for group in groups if "x" not in group]


def can_align(config: SharedAttentionConfig) -> bool:
    """Whether layers share matrices, and every head has a key and a value of its own."""
    return (
        config.depth_sharing not in ("none", "low_rank") and config.num_key_value_heads == config.num_attention_heads
    )


def check_scipy():
    """Raises an ImportError that names the extra where `align_layers` would find no scipy."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("aligning the layers needs scipy: pip install 'shared_bert[convert]', or pass align=False")


def align_layers(
    layers: list[SchemeLayer], config: SharedAttentionConfig, blocks: Blocks, root: torch.Tensor | None = None
) -> list[SchemeLayer]:
    """Turns and reorders the heads of each layer, attention unchanged, so that shared matrices fit the layers better.

    Grouped heads, and layers that share no matrices, stay as they are.
    """
    heads = config.num_attention_heads
    if not can_align(config):
        return layers

    def by_head(name: str) -> torch.Tensor:  # [layers, heads, hidden, head_dim]
        stack = torch.stack([layer.matrices[name].weight for layer in layers])
        # Only what is given the layer's input is weighed by it.
        rows = stack if name == "o" else stack.mT if root is None else root @ stack.mT
        # Matrices count by the share of them that is held.
        return rows.unflatten(2, (heads, -1)).transpose(1, 2) / rows.norm().clamp(min=1e-30)

    names = [name for linear in config.shared_maps for name in config.matrix_widths(linear)]
    own = {name: by_head(name) for name in names}
    groups = turning_together(config.scheme)
    counted = {group: [name for name in group if name in own] for group in groups}
    counted = {group: members for group, members in counted.items() if members}
    still = [name for name in names if not any(name in group for group in counted)]
    in_order = "x" in (config.scheme.query, config.scheme.key, config.scheme.value)  # the input's heads stand still
    identity = torch.eye(config.hidden_size // heads).to(own[names[0]])
    places = torch.arange(heads, device=identity.device)
    order = places.repeat(len(layers), 1)
    turns = {group: identity.expand(len(layers), heads, -1, -1) for group in counted}

    held = 0.0
    for _ in range(_MAX_ITERATIONS):
        wanted = {}
        for name, matrix in own.items():
            coefficients = layer_coefficients(matrix.flatten(1), config, blocks)
            mixing = coefficients @ torch.linalg.pinv(coefficients)
            wanted[name] = (mixing @ matrix.flatten(1)).view_as(matrix)
        before, held = held, float(sum(matrix.square().sum() for matrix in wanted.values()))
        if held - before < _LEAST_GAIN * held:
            break
        if not in_order:
            # What heads gain in each other's place: their inner product, after the best rotation where one is free.
            gain = torch.zeros(len(layers), heads, heads, dtype=identity.dtype, device=identity.device)
            for members in counted.values():
                products = sum(own[name].mT[:, :, None] @ wanted[name][:, None] for name in members)
                gain += torch.linalg.svdvals(products).sum(-1)
            for name in still:
                gain += torch.einsum("lhij,lgij->lhg", own[name], wanted[name])
            best = _best_orders(gain)
            in_order = bool((best == places).all())  # to look on costs more than all the rest
            order = order.gather(1, best)
            own = {name: _take(matrix, best) for name, matrix in own.items()}
            turns = {group: _take(turn, best) for group, turn in turns.items()}
        for group, members in counted.items():
            turn = nearest_rotation(*(torch.cat([m[name] for name in members], dim=2) for m in (own, wanted)))
            turns[group] = turns[group] @ turn
            own |= {name: own[name] @ turn for name in members}
    return [
        _turned(_reordered(layer, order[i], config), {group: turn[i] for group, turn in turns.items()}, config)
        for i, layer in enumerate(layers)
    ]


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorders the heads of [layers, heads, …] by [layers, heads]."""
    return tensor[torch.arange(len(tensor))[:, None], order]


def _turned(
    layer: SchemeLayer, turns: dict[tuple[str, ...], torch.Tensor], config: SharedAttentionConfig
) -> SchemeLayer:
    """Rotates the matrices of each group by [heads, head_dim, head_dim]."""
    heads, scheme = config.num_attention_heads, config.scheme
    matrices, ingredient = dict(layer.matrices), layer.ingredient
    for group, turn in turns.items():
        for name in group:
            weight, bias = matrices[name].weight, matrices[name].bias
            if name == "o":
                weight = (weight.unflatten(1, (heads, -1)).transpose(0, 1) @ turn).transpose(0, 1).flatten(1)
            else:
                weight = (turn.mT @ weight.unflatten(0, (heads, -1))).flatten(0, 1)
                bias = (bias.unflatten(0, (heads, 1, -1)) @ turn).flatten()
            matrices[name] = Affine(weight, bias)
        if scheme.query in group:
            ingredient = scheme.ingredient.turn(ingredient, turn)
    return replace(layer, matrices=matrices, ingredient=ingredient)


def _best_orders(gain: torch.Tensor) -> torch.Tensor:
    """Finds for every layer which head to put in each place, [layers, heads], by [layers, heads, places]."""
    from scipy.optimize import linear_sum_assignment

    places = [linear_sum_assignment(layer.cpu().numpy(), maximize=True)[1] for layer in gain]
    return torch.stack([torch.as_tensor(place).argsort() for place in places]).to(gain.device)


def _reordered(layer: SchemeLayer, order: torch.Tensor, config: SharedAttentionConfig) -> SchemeLayer:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    matrices = {
        name: Affine(rows(affine.weight.T).T, affine.bias)
        if name == "o"
        else Affine(rows(affine.weight), rows(affine.bias))
        for name, affine in layer.matrices.items()
    }
    return SchemeLayer(matrices, config.scheme.ingredient.reorder(layer.ingredient, order), order)
