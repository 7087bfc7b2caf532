"""Heads rotated and reordered, attention unchanged, so that the layers come closer to one another.

The heads of a layer may stand in any order, and the query and key of a head, or its value and output, may be rotated
together. The alignment alternates between fitting the shared matrices and bringing every layer nearer to its fit
(orthogonal Procrustes; the heads' order by the assignment with the largest gain), so the squared error only falls.
Zhussip et al. (arXiv 2508.04581) do not align.
"""

import importlib.util
from dataclasses import replace

import torch

from ..modeling import Scheme, SharedAttentionConfig
from .dense import Affine, SchemeLayer
from .depth_fitting import DictionaryGroups, layer_coefficients
from .fitting import nearest_rotation

_MAX_ITERATIONS = 100
_LEAST_GAIN = 1e-4  # of the fit's squared norm, in one iteration


def turning_together(scheme: Scheme) -> list[tuple[str, ...]]:
    """Return the groups of a head's matrices that one rotation may turn without a change of attention.

    The query's turns with the key's and the value's with the output's ("o", on its inputs); groups with a matrix in
    common are one. The input itself cannot be turned, nor what turns with it.
    """
    if not scheme.ingredient.can_turn:
        return []
    first, second = {scheme.query, scheme.key}, {scheme.value, "o"}
    groups = [first | second] if first & second else [first, second]
    in_order = (*scheme.matrices, "o")
    return [tuple(name for name in in_order if name in group) for group in groups if "x" not in group]


def can_align(config: SharedAttentionConfig) -> bool:
    """Return whether layers share matrices, and every head has a key and a value of its own."""
    shares = config.depth_sharing not in ("none", "low_rank")
    return shares and config.num_key_value_heads == config.num_attention_heads


def check_scipy():
    """Raise an ImportError that names the extra if scipy is missing, which `align_layers` needs."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("aligning the layers needs scipy: pip install 'shared_bert[convert]', or pass align=False")


def align_layers(
    layers: list[SchemeLayer],
    config: SharedAttentionConfig,
    groups: DictionaryGroups,
    root: torch.Tensor | None = None,
) -> list[SchemeLayer]:
    """Return the layers with rotated and reordered heads; unchanged where `can_align` is false.

    Args:
        groups: see `layer_coefficients`.
        root: of the inputs' autocorrelation, the mean over the layers, [hidden, hidden]; None takes the identity.
    """
    if not can_align(config):
        return layers
    heads = _Heads(layers, config, root)
    held = 0.0
    for _ in range(_MAX_ITERATIONS):
        fit = heads.fit(groups)
        before, held = held, float(sum(matrix.square().sum() for matrix in fit.values()))
        if held - before < _LEAST_GAIN * held:
            break
        heads.reorder(fit)
        heads.rotate(fit)
    return heads.applied_to(layers)


class _Heads:
    """The shared matrices of all layers by head, and how far each head has been moved and rotated.

    Attributes:
        matrices: [layers, heads, hidden, head_dim] by name, weighted by the inputs and scaled to norm one.
        order: [layers, heads], the original head at each place.
        rotations: [layers, heads, head_dim, head_dim] by group of matrices that turn together.
    """

    def __init__(self, layers: list[SchemeLayer], config: SharedAttentionConfig, root: torch.Tensor | None):
        self.config = config
        names = list(config.shared_widths)
        self.matrices = {name: self._by_head(layers, name, root) for name in names}
        number = config.num_attention_heads
        self.places = torch.arange(number, device=self.matrices[names[0]].device)
        self.order = self.places.repeat(len(layers), 1)
        self.settled = "x" in config.scheme.roles  # the order; heads of the input cannot be moved
        self.shared = {
            group: members
            for group in turning_together(config.scheme)
            if (members := [name for name in group if name in names])
        }
        self.not_turning = [name for name in names if not any(name in group for group in self.shared)]
        identity = torch.eye(config.hidden_size // number).to(self.matrices[names[0]])
        self.rotations = {group: identity.expand(len(layers), number, -1, -1) for group in self.shared}

    def _by_head(self, layers: list[SchemeLayer], name: str, root: torch.Tensor | None) -> torch.Tensor:
        stack = torch.stack([layer.matrices[name].weight for layer in layers])
        rows = stack if name == "o" else stack.mT
        if root is not None and name != "o":  # the output acts on the context, not on the layer's inputs
            rows = root @ rows
        heads = rows.unflatten(2, (self.config.num_attention_heads, -1)).transpose(1, 2)
        return heads / rows.norm().clamp(min=1e-30)

    def fit(self, groups: DictionaryGroups) -> dict[str, torch.Tensor]:
        """Return the nearest matrices that the depth sharing can express."""
        fit = {}
        for name, matrix in self.matrices.items():
            coefficients = layer_coefficients(matrix.flatten(1), self.config, groups)
            projection = coefficients @ torch.linalg.pinv(coefficients)
            fit[name] = (projection @ matrix.flatten(1)).view_as(matrix)
        return fit

    def reorder(self, fit: dict[str, torch.Tensor]):
        """Put the heads of each layer where they agree best with `fit`, until their order has settled."""
        if self.settled:
            return
        # The gain of a head at a place is an inner product, after the best rotation where one is free.
        gains = 0
        for members in self.shared.values():
            products = sum(self.matrices[name].mT[:, :, None] @ fit[name][:, None] for name in members)
            gains = gains + torch.linalg.svdvals(products).sum(-1)
        for name in self.not_turning:
            gains = gains + torch.einsum("lhij,lgij->lhg", self.matrices[name], fit[name])
        best = _best_orders(gains)
        self.settled = bool((best == self.places).all())  # the gains take longer than all the rest
        self.order = self.order.gather(1, best)
        self.matrices = {name: _take(matrix, best) for name, matrix in self.matrices.items()}
        self.rotations = {group: _take(rotation, best) for group, rotation in self.rotations.items()}

    def rotate(self, fit: dict[str, torch.Tensor]):
        """Rotate each head towards `fit`."""
        for group, members in self.shared.items():
            own, target = (torch.cat([side[name] for name in members], dim=2) for side in (self.matrices, fit))
            rotation = nearest_rotation(own, target)
            self.rotations[group] = self.rotations[group] @ rotation
            self.matrices |= {name: self.matrices[name] @ rotation for name in members}

    def applied_to(self, layers: list[SchemeLayer]) -> list[SchemeLayer]:
        moved = (_reordered(layer, order, self.config) for layer, order in zip(layers, self.order, strict=True))
        return [
            _rotated(layer, {group: rotation[i] for group, rotation in self.rotations.items()}, self.config)
            for i, layer in enumerate(moved)
        ]


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the heads of [layers, heads, …] by [layers, heads]."""
    return tensor[torch.arange(len(tensor))[:, None], order]


def _best_orders(gains: torch.Tensor) -> torch.Tensor:
    """Return the head for each place of every layer, [layers, heads], by their `gains` [layers, heads, places]."""
    from scipy.optimize import linear_sum_assignment

    places = [linear_sum_assignment(layer.cpu().numpy(), maximize=True)[1] for layer in gains]
    return torch.stack([torch.as_tensor(place).argsort() for place in places]).to(gains.device)


def _reordered(layer: SchemeLayer, order: torch.Tensor, config: SharedAttentionConfig) -> SchemeLayer:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    matrices = {name: Affine(rows(affine.weight), rows(affine.bias)) for name, affine in layer.matrices.items()}
    output = layer.matrices["o"]
    matrices["o"] = Affine(rows(output.weight.T).T, output.bias)
    return SchemeLayer(matrices, config.scheme.ingredient.reorder(layer.ingredient, order), order)


def _rotated(
    layer: SchemeLayer, rotations: dict[tuple[str, ...], torch.Tensor], config: SharedAttentionConfig
) -> SchemeLayer:
    """Rotate the matrices of each group by [heads, head_dim, head_dim]."""
    heads, scheme = config.num_attention_heads, config.scheme
    matrices, ingredient = dict(layer.matrices), layer.ingredient
    for group, rotation in rotations.items():
        for name in group:
            weight, bias = matrices[name].weight, matrices[name].bias
            if name == "o":
                weight = (weight.unflatten(1, (heads, -1)).transpose(0, 1) @ rotation).transpose(0, 1).flatten(1)
            else:
                weight = (rotation.mT @ weight.unflatten(0, (heads, -1))).flatten(0, 1)
                bias = (bias.unflatten(0, (heads, 1, -1)) @ rotation).flatten()
            matrices[name] = Affine(weight, bias)
        if scheme.query in group:
            ingredient = scheme.ingredient.turn(ingredient, rotation)
    return replace(layer, matrices=matrices, ingredient=ingredient)
