"""Heads rotated and reordered, attention unchanged, so that the layers come closer to one another.

The heads of a layer may stand in any order, and the query and key of a head, or its value and output, may be rotated
together. Where positions rotate queries and keys (RoPE), only what commutes with that is free: a rotation of each pair
of channels. The alignment alternates between fitting the shared matrices and bringing every layer nearer to its fit
(orthogonal Procrustes; the heads' order by the assignment with the largest gain), so the squared error only falls.
Zhussip et al. (arXiv 2508.04581) do not align.
"""

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch

from ..modeling import Scheme
from .dense import Affine, SchemeLayer
from .depth_fitting import DepthSharingFields, DictionaryGroups, layer_coefficients
from .fitting import nearest_rotation
from .rotary_fitting import multiplication

_MAX_ITERATIONS = 100
_LEAST_GAIN = 1e-4  # of the fit's squared norm, in one iteration


@dataclass(frozen=True)
class Rotation:
    """The rotations that a head's channels are free to take.

    Attributes:
        nearest: takes a matrix [..., n, head_dim] and a target, and returns the rotation [..., head_dim, head_dim]
            that brings the one closest to the other.
        gain: takes their product matrixᵀ·target, and returns their inner product after that rotation.
    """

    nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gain: Callable[[torch.Tensor], torch.Tensor]


def _pair_products(products: torch.Tensor) -> torch.Tensor:
    """Return the complex inner product of each pair of channels j and j + head_dim / 2."""
    half = products.shape[-1] // 2
    same = products.diagonal(dim1=-2, dim2=-1)
    upper, lower = (products.diagonal(offset, -2, -1) for offset in (half, -half))
    return torch.complex(same[..., :half] + same[..., half:], upper - lower)


def _nearest_rotation_of_pairs(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    angles = _pair_products(matrix.mT @ target).angle()
    return multiplication(torch.polar(torch.ones_like(angles), angles))


ANY_ROTATION = Rotation(nearest_rotation, lambda products: torch.linalg.svdvals(products).sum(-1))
ROTATION_OF_PAIRS = Rotation(_nearest_rotation_of_pairs, lambda products: _pair_products(products).abs().sum(-1))


@dataclass
class Freedom:
    """What may be done to the heads of a layer without a change of attention.

    Attributes:
        heads: of keys; grouped query heads are moved and rotated with theirs.
        rotations: of the matrices that rotate together, by their names ("o" is the output's, on its inputs).
        reorders: whether heads may stand in any order.
    """

    heads: int
    rotations: dict[tuple[str, ...], Rotation]
    reorders: bool

    @classmethod
    def of(cls, scheme: Scheme, heads: int, rotation_of_logits: Rotation | None = ANY_ROTATION) -> "Freedom":
        """Return the freedom that a scheme leaves.

        The query's matrix rotates with the key's and the value's with the output's; groups with a matrix in common are
        one. The input itself can neither be rotated nor reordered, nor what rotates with it.

        Args:
            rotation_of_logits: of query and key; None where they cannot be rotated.
        """
        reorders = "x" not in scheme.roles
        if not scheme.ingredient.can_turn:
            return cls(heads, {}, reorders)
        first, second = {scheme.query, scheme.key}, {scheme.value, "o"}
        groups = [(first, rotation_of_logits), (second, ANY_ROTATION)]
        if first & second:
            groups = [(first | second, rotation_of_logits)]
        in_order = (*scheme.matrices, "o")
        rotations = {
            tuple(name for name in in_order if name in group): rotation
            for group, rotation in groups
            if "x" not in group and rotation is not None
        }
        return cls(heads, rotations, reorders)


def can_align(config: DepthSharingFields) -> bool:
    """Return whether layers share matrices, to which aligning brings them closer."""
    return config.depth_sharing not in ("none", "low_rank")


def check_scipy():
    """Raise an ImportError that names the extra if scipy is missing, which `align_layers` needs."""
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("aligning the layers needs scipy: pip install 'shared_bert[convert]', or pass align=False")


def align_layers(
    layers: list[SchemeLayer],
    scheme: Scheme,
    freedom: Freedom,
    shared: Collection[str],
    sharing: DepthSharingFields,
    groups: DictionaryGroups,
    root: torch.Tensor | None = None,
) -> list[SchemeLayer]:
    """Return the layers with rotated and reordered heads.

    Args:
        shared: the names of the matrices that layers share.
        sharing: how they share them.
        groups: see `layer_coefficients`.
        root: of the inputs' autocorrelation, the mean over the layers, [hidden, hidden]; None takes the identity.
    """
    heads = _Heads(layers, freedom, shared, root)
    # Heads are reordered until their order settles, and again whenever rotations gain nothing more.
    held, in_order = 0.0, not freedom.reorders
    for _ in range(_MAX_ITERATIONS):
        fit = heads.fit(sharing, groups)
        before, held = held, float(sum(matrix.square().sum() for matrix in fit.values()))
        if held - before < _LEAST_GAIN * held:
            if not (freedom.reorders and heads.reorder(fit)):
                break
        elif not in_order:
            in_order = not heads.reorder(fit)
        heads.rotate(fit)
    return heads.applied_to(layers, scheme)


class _Heads:
    """The shared matrices of all layers by head, and how far each head has been moved and rotated.

    Attributes:
        matrices: [layers, heads, n, head_dim] by name, weighted by the inputs and scaled to norm one; n is hidden, or
            a multiple of it where several query heads belong to a key's.
        order: [layers, heads], the original head at each place.
        rotations: [layers, heads, head_dim, head_dim] by group of matrices that rotate together.
    """

    def __init__(
        self, layers: list[SchemeLayer], freedom: Freedom, shared: Collection[str], root: torch.Tensor | None
    ):
        self.freedom = freedom
        self.head_dim = key_width(layers[0]) // freedom.heads
        self.matrices = {name: self._by_head(layers, name, root) for name in shared}
        like = next(iter(self.matrices.values()))
        self.order = torch.arange(freedom.heads, device=like.device).repeat(len(layers), 1)
        self.shared = {
            group: members for group in freedom.rotations if (members := [name for name in group if name in shared])
        }
        self.not_rotating = [name for name in shared if not any(name in group for group in self.shared)]
        identity = torch.eye(self.head_dim).to(like)
        self.rotations = {group: identity.expand(len(layers), freedom.heads, -1, -1) for group in self.shared}

    def _by_head(self, layers: list[SchemeLayer], name: str, root: torch.Tensor | None) -> torch.Tensor:
        stack = torch.stack([layer.matrices[name].weight for layer in layers])
        rows = stack if name == "o" else stack.mT
        if root is not None and name != "o":  # the output acts on the context, not on the layer's inputs
            rows = root @ rows
        heads = rows.unflatten(2, (self.freedom.heads, -1, self.head_dim)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        return heads / rows.norm().clamp(min=1e-30)

    def fit(self, sharing: DepthSharingFields, groups: DictionaryGroups) -> dict[str, torch.Tensor]:
        """Return the nearest matrices that the depth sharing can express."""
        fit = {}
        for name, matrix in self.matrices.items():
            coefficients = layer_coefficients(matrix.flatten(1), sharing, groups)
            projection = coefficients @ torch.linalg.pinv(coefficients)
            fit[name] = (projection @ matrix.flatten(1)).view_as(matrix)
        return fit

    def reorder(self, fit: dict[str, torch.Tensor]) -> bool:
        """Put the heads of each layer where they agree best with `fit`; return whether any has moved.

        It takes longer than all the rest.
        """
        # The gain of a head at a place is an inner product, after the best rotation where one is free.
        gains = 0
        for group, members in self.shared.items():
            products = sum(self.matrices[name].mT[:, :, None] @ fit[name][:, None] for name in members)
            gains = gains + self.freedom.rotations[group].gain(products)
        for name in self.not_rotating:
            gains = gains + torch.einsum("lhij,lgij->lhg", self.matrices[name], fit[name])
        best = _best_orders(gains)
        self.order = self.order.gather(1, best)
        self.matrices = {name: _take(matrix, best) for name, matrix in self.matrices.items()}
        self.rotations = {group: _take(rotation, best) for group, rotation in self.rotations.items()}
        return bool((best != torch.arange(best.shape[1], device=best.device)).any())

    def rotate(self, fit: dict[str, torch.Tensor]):
        """Rotate each head towards `fit`."""
        for group, members in self.shared.items():
            own, target = (torch.cat([side[name] for name in members], dim=2) for side in (self.matrices, fit))
            rotation = self.freedom.rotations[group].nearest(own, target)
            self.rotations[group] = self.rotations[group] @ rotation
            self.matrices |= {name: self.matrices[name] @ rotation for name in members}

    def applied_to(self, layers: list[SchemeLayer], scheme: Scheme) -> list[SchemeLayer]:
        moved = (_reordered(layer, order, scheme) for layer, order in zip(layers, self.order, strict=True))
        return [
            _rotated(layer, {group: rotation[i] for group, rotation in self.rotations.items()}, scheme)
            for i, layer in enumerate(moved)
        ]


def key_width(layer: SchemeLayer) -> int:
    """Return the channels of all keys; there are fewer than of the queries where several share a key."""
    return min(len(matrix.weight) for name, matrix in layer.matrices.items() if name != "o")


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the heads of [layers, heads, …] by [layers, heads]."""
    return tensor[torch.arange(len(tensor), device=order.device)[:, None], order]


def _best_orders(gains: torch.Tensor) -> torch.Tensor:
    """Return the head for each place of every layer, [layers, heads], by their `gains` [layers, heads, places]."""
    from scipy.optimize import linear_sum_assignment

    places = [linear_sum_assignment(layer.cpu().numpy(), maximize=True)[1] for layer in gains]
    return torch.stack([torch.as_tensor(place).argsort() for place in places]).to(gains.device)


def _reordered(layer: SchemeLayer, order: torch.Tensor, scheme: Scheme) -> SchemeLayer:
    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)

    matrices = {name: Affine(rows(affine.weight), rows(affine.bias)) for name, affine in layer.matrices.items()}
    output = layer.matrices["o"]
    matrices["o"] = Affine(rows(output.weight.T).T, output.bias)
    per_key = output.weight.shape[1] // key_width(layer)
    query_order = (order[:, None] * per_key + torch.arange(per_key, device=order.device)).flatten()
    return SchemeLayer(matrices, scheme.ingredient.reorder(layer.ingredient, order), query_order)


def _rotated(layer: SchemeLayer, rotations: dict[tuple[str, ...], torch.Tensor], scheme: Scheme) -> SchemeLayer:
    """Rotate the matrices of each group by [heads, head_dim, head_dim]."""
    matrices, ingredient = dict(layer.matrices), layer.ingredient
    for group, rotation in rotations.items():
        for name in group:
            weight, bias = matrices[name].weight, matrices[name].bias
            columns = _rotated_columns(weight if name == "o" else weight.T, rotation)
            if name == "o":
                matrices[name] = Affine(columns, bias)
            else:
                matrices[name] = Affine(columns.T, _rotated_columns(bias[None], rotation)[0])
        if scheme.query in group:
            ingredient = scheme.ingredient.turn(ingredient, rotation)
    return replace(layer, matrices=matrices, ingredient=ingredient)


def _rotated_columns(columns: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the columns [n, channels] of each head."""
    heads, head_dim, _ = rotation.shape
    return torch.einsum("nhgc,hcd->nhgd", columns.unflatten(1, (heads, -1, head_dim)), rotation).flatten(1)
