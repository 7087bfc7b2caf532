"""The nearest layer of a scheme to a stock layer, without training.

Attention knows its matrices by two products per head: A = W_q·W_kᵀ, which makes the logits, and B = W_v·W_o, which
makes the result (matrices that act on row vectors, [in, out]). A scheme is fitted to these. So every freedom which
leaves attention unchanged is used (W_q·G with W_k·G⁻ᵀ, W_v·H with H⁻¹·W_o, for any invertible G and H), and W_o is
fitted with the value where a scheme changes that. The error to be small is the sum over the heads of that of A and B,
each relative to its own size and measured on the layer's inputs where their autocorrelation C is known:
‖C^½·(A − A')·C^½‖² / ‖C^½·A·C^½‖² + ‖C^½·(B − B')‖² / ‖C^½·B‖².

| scheme | A' | B' | solution per head |
|---|---|---|---|
| ``symmetric`` | P·Pᵀ | B | the eigenvectors of (A + Aᵀ)/2 with the largest eigenvalues |
| ``pairwise`` | P·Uᵀ·Pᵀ | B | the subspace P that holds most of A on both sides, by iteration; U is A within it |
| ``shared`` | S·diag(e)·Sᵀ | S·W_o' | the subspace that holds most of A and B, by iteration; A's eigenvectors in it |
| ``unified`` | S·Sᵀ | S·W_o' | the same, with eigenvalues that are not negative |
| ``shared_kv`` | W_q'·Pᵀ | P·W_o' | the subspace P that holds most of Aᵀ and B |
| ``query_free`` | E·W_k'ᵀ | B | W_q regressed on E, the head's slice of the input |
| ``key_free`` | W_q'·Eᵀ | B | W_k regressed on E |
| ``value_free`` | A | E·W_o' | W_v regressed on E |

Where heads share a key or a value, theirs is the subspace that holds most of the group's Aᵀ or B (of ``query_free``
keys: one regression for the group).

No layer of the scheme has a smaller error than these, but for the three others: their subspaces are found by
iteration and may be a local optimum, and ``unified`` has no best (the smaller a direction that only the value needs,
the better). A layer that has the scheme already is fitted exactly, whatever C.

Of the biases, the key's never matters (it shifts all logits of a query alike), the value's passes into the output's
exactly, and the query's is regressed on the new keys.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from ..modeling import Scheme
from ..modeling.ingredients import Diagonals
from .dense import Affine, DenseAttention, SchemeLayer

_ITERATIONS = 20
_REFINEMENTS = 50
_DAMPING = 0.1  # without it a refinement may overshoot and return
_SHRINKAGE = 1e-3
# ``unified`` gives a direction that only the value needs an eigenvalue of this share of the logits' error: it costs
# a millionth more, no channel becomes so small that it could not be trained, and an exact fit stays exact.
_LEAST_EIGENVALUE = 1e-3


class AttentionFields(Protocol):
    """What fitting asks of a config."""

    attention_scheme: str
    scheme: Scheme
    attention_scale: float | None
    num_attention_heads: int
    num_key_value_heads: int


@dataclass
class Heads:
    """A stock layer's matrices head by head, as they act on row vectors."""

    query: torch.Tensor  # [heads, hidden, head_dim], and so key and value
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor  # [heads, head_dim, hidden]
    query_bias: torch.Tensor  # [heads, head_dim]
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    output_bias: torch.Tensor  # [hidden]

    @classmethod
    def of(cls, layer: DenseAttention, head_dim: int) -> "Heads":
        roles = (layer.query, layer.key, layer.value)
        weights = [role.weight.unflatten(0, (-1, head_dim)).transpose(1, 2) for role in roles]
        biases = [role.bias.unflatten(0, (-1, head_dim)) for role in roles]
        return cls(*weights, layer.output.weight.T.unflatten(0, (-1, head_dim)), *biases, layer.output.bias)

    def reordered(self, order: torch.Tensor) -> "Heads":
        """Put the heads in another order."""
        parts = (getattr(self, field.name) for field in fields(self) if field.name != "output_bias")
        return Heads(*(part[order] for part in parts), self.output_bias)


def joined(heads: torch.Tensor, bias: torch.Tensor | None = None) -> Affine:
    """Put [heads, hidden, head_dim] side by side, as a weight [out, in] with its bias (or zeros)."""
    weight = heads.transpose(1, 2).flatten(0, 1)
    return Affine(weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.flatten())


def output_of(heads: Heads, output: torch.Tensor, value_bias: torch.Tensor | None = None) -> Affine:
    """Return the output's map, with the bias that gives the old result for constant values.

    The weights of attention sum to one, so a value's bias passes through it as it is.
    """
    bias = heads.output_bias + torch.einsum("hi,hij->j", heads.value_bias, heads.output)
    if value_bias is not None:
        bias = bias - torch.einsum("hi,hij->j", value_bias, output)
    return Affine(output.flatten(0, 1).T, bias)


def nearest_rotation(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal R [..., n, n] that brings matrix·R closest to target, both [..., m, n] (Procrustes)."""
    left, _, right = torch.linalg.svd(matrix.transpose(-1, -2) @ target)
    return left @ right


@dataclass
class Metric:
    """The inputs' autocorrelation as a root and its inverse, in which plain least squares weighs by the inputs."""

    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, autocorrelation: torch.Tensor) -> "Metric":
        """Take the roots of [n, n]; directions that the inputs hardly have are counted with a share of the mean."""
        eigenvalues, vectors = torch.linalg.eigh(autocorrelation)
        eigenvalues = eigenvalues.clamp(min=0) + _SHRINKAGE * eigenvalues.mean().clamp(min=1e-12)
        root = eigenvalues.sqrt()
        return cls(vectors * root @ vectors.T, vectors / root @ vectors.T)

    def reduce(self, *matrices: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Express [..., n, k] matrices in one orthonormal basis of what they span in this metric.

        Returns:
            The matrix [..., n, r] that takes coordinates back, and each matrix's coordinates [..., r, k].
        """
        weighed = [self.root @ matrix for matrix in matrices]
        basis = torch.linalg.qr(torch.cat(weighed, dim=-1)).Q
        return self.inverse @ basis, [basis.mT @ matrix for matrix in weighed]


def _positive_part(symmetric: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return vectors * eigenvalues.clamp(min=0)[..., None, :] @ vectors.mT


def _relative(gram: torch.Tensor) -> torch.Tensor:
    return gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)[..., None, None]


def _norm(matrix: torch.Tensor) -> torch.Tensor:
    """The norm of each of [..., n, m], to divide by: [..., 1, 1], and one for zeros."""
    norm = matrix.norm(dim=(-2, -1), keepdim=True)
    return torch.where(norm > 0, norm, 1)


def _best_subspace(
    logits: torch.Tensor, number: int, result: torch.Tensor | float = 0.0, positive: bool = False
) -> torch.Tensor:
    """Return the P [..., r, number] with the largest ‖M‖² + tr(Pᵀ·result·P), where M = Pᵀ·A·P.

    Whole eigenvectors are exchanged first, which goes far but need not settle; small steps along the gradient follow.

    Args:
        logits: A [..., r, r], of norm one.
        positive: count of M only what has positive eigenvalues; A is symmetric.
    """
    coarse = _positive_part(logits) if positive else logits
    inside = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    for _ in range(_ITERATIONS):
        gram = coarse @ inside @ coarse.mT + coarse.mT @ inside @ coarse
        subspace = torch.linalg.eigh(gram + result).eigenvectors[..., -number:]
        inside = subspace @ subspace.mT
    result = result + _DAMPING * torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    for _ in range(_REFINEMENTS):
        within = subspace.mT @ logits @ subspace
        if positive:
            within = _positive_part(within)
        gradient = logits @ subspace @ within.mT + logits.mT @ subspace @ within + result @ subspace
        subspace = torch.linalg.qr(gradient).Q
    return subspace


def _serve_groups(
    metric: Metric, groups: int, *products: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the matrix that best replaces one factor of the products of all heads in a group.

    Args:
        products: pairs of the factor to replace [heads, hidden, head_dim] and the other one [heads, n, head_dim]
            (weighed by the metric where it is given inputs), which may change.

    Returns:
        The new matrices [heads / groups, hidden, head_dim], and for each product the G [heads, head_dim, head_dim]
        with new·G in the place of the old factor, or other·Gᵀ in that of the other.
    """
    old = [factor for factor, _ in products]
    wide = [factor.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2) for factor in old]  # a group side by side
    back, coordinates = metric.reduce(*wide)
    coordinates = [c.unflatten(-1, (groups, -1)).transpose(1, 2).flatten(0, 1) for c in coordinates]  # by head again
    grams = [_relative(c @ (other.mT @ other) @ c.mT) for c, (_, other) in zip(coordinates, products, strict=True)]
    gram = sum(grams).unflatten(0, (-1, groups)).sum(1)
    subspace = torch.linalg.eigh(gram).eigenvectors[..., -old[0].shape[-1] :]
    size = _size_of(*old).unflatten(0, (-1, groups)).mean(1) / _size_of(back @ subspace)
    inside = (subspace / size).repeat_interleave(groups, 0).mT
    return back @ subspace * size, [inside @ c for c in coordinates]


def fit_scheme(
    layer: DenseAttention, config: AttentionFields, autocorrelation: torch.Tensor | None = None
) -> SchemeLayer:
    """Fit the scheme of `config` to a stock layer; see the table above.

    Args:
        layer: with as many key as query heads.
        config: of the new model.
        autocorrelation: the mean of x·xᵀ over the layer's inputs, [hidden, hidden]; None takes the identity.
    """
    size, hidden_size = layer.query.weight.shape
    heads = Heads.of(layer, size // config.num_attention_heads)
    scale = config.scheme.scale if config.attention_scale is None else config.attention_scale
    heads.query, heads.query_bias = heads.query / scale, heads.query_bias / scale
    if autocorrelation is None:
        autocorrelation = torch.eye(hidden_size, dtype=torch.float64, device=heads.query.device)
    return FITS[config.attention_scheme](heads, Metric.of(autocorrelation), config)


def _fit_standard(heads: Heads, metric: Metric, config) -> SchemeLayer:
    groups = config.num_attention_heads // config.num_key_value_heads
    query, key = joined(heads.query, heads.query_bias), joined(heads.key, heads.key_bias)
    if groups > 1:
        new, (inside,) = _serve_groups(metric, groups, (heads.key, metric.root @ heads.query))
        bias = _query_bias(heads, metric, new.repeat_interleave(groups, 0))
        query, key = joined(heads.query @ inside.mT, bias), joined(new)
    return SchemeLayer({"q": query, "k": key, **_value(heads, metric, groups)})


def _value(heads: Heads, metric: Metric, groups: int = 1) -> dict[str, Affine]:
    if groups == 1:
        return {"v": joined(heads.value, heads.value_bias), "o": output_of(heads, heads.output, heads.value_bias)}
    new, (inside,) = _serve_groups(metric, groups, (heads.value, heads.output.mT))
    return {"v": joined(new), "o": output_of(heads, inside @ heads.output)}


def _fit_symmetric(heads: Heads, metric: Metric, config) -> SchemeLayer:
    back, (query, key) = metric.reduce(heads.query, heads.key)
    logits = query @ key.mT
    eigenvalues, vectors = torch.linalg.eigh((logits + logits.mT) / 2)
    number = heads.query.shape[-1]
    new = back @ (vectors[..., -number:] * eigenvalues[..., None, -number:].clamp(min=0).sqrt())
    return SchemeLayer({"q": joined(new, _query_bias(heads, metric, new)), **_value(heads, metric)})


def _fit_pairwise(heads: Heads, metric: Metric, config) -> SchemeLayer:
    back, (query, key) = metric.reduce(heads.query, heads.key)
    logits = query @ key.mT
    subspace = _best_subspace(logits / _norm(logits), heads.query.shape[-1])
    inside = subspace.mT @ logits @ subspace
    new = back @ subspace
    size = _size_of(heads.query, heads.key) / _size_of(new)
    new, pairwise = new * size, inside.mT / size**2  # q·kᵀ = q·Uᵀ·qᵀ
    bias = _query_bias(heads, metric, new @ pairwise)
    return SchemeLayer({"q": joined(new, bias), **_value(heads, metric)}, {"pairwise": pairwise})


def _fit_shared(heads: Heads, metric: Metric, config) -> SchemeLayer:
    back, (query, key, value) = metric.reduce(heads.query, heads.key, heads.value)
    whole = query @ key.mT
    norm = _norm(whole)
    whole = whole / norm
    logits = (whole + whole.mT) / 2
    result = _relative(value @ heads.output @ heads.output.mT @ value.mT)
    has_diagonals = isinstance(config.scheme.ingredient, Diagonals)
    subspace = _best_subspace(logits, heads.query.shape[-1], result, positive=not has_diagonals)
    eigenvalues, vectors = torch.linalg.eigh(subspace.mT @ logits @ subspace)
    subspace = subspace @ vectors
    if has_diagonals:
        size = _size_of(heads.query, heads.key, heads.value) / _size_of(back @ subspace)
        size = size.expand(-1, 1, subspace.shape[-1])
    else:
        error = (whole - subspace * eigenvalues.clamp(min=0)[:, None] @ subspace.mT).norm(dim=(-2, -1))[:, None]
        eigenvalues = torch.maximum(eigenvalues, (_LEAST_EIGENVALUE * error).clamp(min=1e-12))
        size = (norm * eigenvalues[:, None]).sqrt()
    new = back @ subspace * size
    weights = norm * eigenvalues[:, None] / size**2  # of the channels in the logits: d_q·d_k, or ones
    bias = _query_bias(heads, metric, new * weights)
    output = subspace.mT @ value @ heads.output / size.mT
    matrices = {"s": joined(new, bias), "o": output_of(heads, output, bias)}
    if not has_diagonals:
        return SchemeLayer(matrices)
    root = weights.abs().sqrt()
    diagonals = {"query": root * weights.sign(), "key": root, "value": torch.ones_like(root)}
    return SchemeLayer(matrices, {f"{role}_diagonal": diagonal.flatten() for role, diagonal in diagonals.items()})


def _fit_shared_kv(heads: Heads, metric: Metric, config) -> SchemeLayer:
    groups = config.num_attention_heads // config.num_key_value_heads
    products = (heads.key, metric.root @ heads.query), (heads.value, heads.output.mT)
    new, (key, value) = _serve_groups(metric, groups, *products)
    bias = _query_bias(heads, metric, new.repeat_interleave(groups, 0))
    query = joined(heads.query @ key.mT, bias)
    return SchemeLayer({"q": query, "k": joined(new), "o": output_of(heads, value @ heads.output)})


def least_squares(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the W of least norm that minimises ‖inputs·W - targets‖, for batches of matrices."""
    # CUDA solves inputs of full rank only.
    return torch.linalg.lstsq(inputs.cpu(), targets.cpu(), driver="gelsd").solution.to(inputs.device)


def _slices(metric: Metric, number: int) -> torch.Tensor:
    """C^½·E of each head, where E picks the head's slice of the input: [heads, hidden, head_dim]."""
    return metric.root.unflatten(1, (number, -1)).transpose(0, 1)


def _slice_regression(metric: Metric, matrix: torch.Tensor) -> torch.Tensor:
    """Predict x·matrix of each head from its slice of x: [heads, head_dim, head_dim]."""
    return least_squares(_slices(metric, len(matrix)), metric.root @ matrix)


def _fit_query_free(heads: Heads, metric: Metric, config) -> SchemeLayer:
    groups = config.num_attention_heads // config.num_key_value_heads
    if groups == 1:
        key = heads.key @ _slice_regression(metric, heads.query).mT
    else:  # one regression for all heads of a group
        logits = metric.root @ heads.query @ heads.key.mT
        norm = _norm(logits @ metric.root)
        slices = _slices(metric, len(norm))
        stacked = ((rows / norm).unflatten(0, (-1, groups)).flatten(1, 2) for rows in (slices, logits))
        key = least_squares(*stacked).mT
    return SchemeLayer({"k": joined(key), **_value(heads, metric, groups)})


def _fit_key_free(heads: Heads, metric: Metric, config) -> SchemeLayer:
    key = _slice_regression(metric, heads.key)
    query = joined(heads.query @ key.mT, (key @ heads.query_bias[..., None]).squeeze(-1))
    return SchemeLayer({"q": query, **_value(heads, metric)})


def _fit_value_free(heads: Heads, metric: Metric, config) -> SchemeLayer:
    value = _slice_regression(metric, heads.value)
    return SchemeLayer(
        {
            "q": joined(heads.query, heads.query_bias),
            "k": joined(heads.key, heads.key_bias),
            "o": output_of(heads, value @ heads.output),
        }
    )


FITS = {
    "standard": _fit_standard,
    "symmetric": _fit_symmetric,
    "pairwise": _fit_pairwise,
    "shared": _fit_shared,
    "unified": _fit_shared,
    "query_free": _fit_query_free,
    "key_free": _fit_key_free,
    "value_free": _fit_value_free,
    "shared_kv": _fit_shared_kv,
}


def _query_bias(heads: Heads, metric: Metric, new_key: torch.Tensor) -> torch.Tensor:
    """Return the query bias [heads, head_dim] that adds to the logits of each key what the old one did."""
    target = heads.key @ heads.query_bias[..., None]
    return least_squares(metric.root @ new_key, metric.root @ target).squeeze(-1)


def _size_of(*matrices: torch.Tensor) -> torch.Tensor:
    """The root mean square of the entries of matrices [heads, …], by head: [heads, 1, 1]."""
    return torch.stack([m.square().mean((-2, -1), keepdim=True) for m in matrices]).mean(0).sqrt().clamp(min=1e-30)
