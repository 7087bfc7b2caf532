"""The nearest layer of a scheme to a stock layer, in closed form.

Attention knows its matrices by two products per head: A = W_q·W_kᵀ, which makes the logits, and B = W_v·W_o, which
makes the result (matrices that act on row vectors, [in, out]). A scheme is fitted to these. So every freedom which
leaves attention unchanged is used (W_q·G with W_k·G⁻ᵀ, W_v·H with H⁻¹·W_o, for any invertible G and H), and W_o is
fitted with the value where a scheme changes that. The error to be small is that of A and B, each relative to its size
and measured on the layer's inputs where their autocorrelation C is known: ‖C^½·(A − A')·C^½‖² and ‖C^½·(B − B')‖².

| scheme | A' | B' | solution per head |
|---|---|---|---|
| ``symmetric`` | P·Pᵀ | B | the eigenvectors of (A + Aᵀ)/2 with the largest eigenvalues |
| ``pairwise`` | P·Uᵀ·Pᵀ | B | the subspace P that holds most of A on both sides, by iteration; U is A within it |
| ``shared`` | S·diag(e)·Sᵀ | S·W_o' | the subspace that holds most of A and B; S are the eigenvectors of A within it |
| ``unified`` | S·Sᵀ | S·W_o' | the same, with eigenvalues that are not negative |
| ``shared_kv`` | W_q'·Pᵀ | P·W_o' | the subspace P that holds most of Aᵀ and B |
| ``query_free`` | E·W_k'ᵀ | B | W_q regressed on E, the head's slice of the input |
| ``key_free`` | W_q'·Eᵀ | B | W_k regressed on E |
| ``value_free`` | A | E·W_o' | W_v regressed on E |

Of the biases, the key's never matters (it shifts all logits of a query alike), the value's passes into the output's
exactly, and the query's is regressed on the new keys.
"""

from dataclasses import dataclass, field, fields

import torch

from ..modeling import SharedAttentionConfig
from ..modeling.ingredients import Diagonals
from .dense import Affine, DenseAttention

_ITERATIONS = 20
_SHRINKAGE = 1e-3
# Directions whose eigenvalue in ``unified`` is below this share of the largest keep it, for the value's sake.
_LEAST_EIGENVALUE = 1e-3


@dataclass
class FittedLayer:
    """The parameters of a layer: its matrices by name ("o" is the output's), and those of its scheme's ingredient."""

    matrices: dict[str, Affine]
    ingredient: dict[str, torch.Tensor] = field(default_factory=dict)
    head_order: torch.Tensor | None = None  # which head of the stock layer stands where; None as they stood


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
        """Puts the heads in another order."""
        parts = (getattr(self, field.name) for field in fields(self) if field.name != "output_bias")
        return Heads(*(part[order] for part in parts), self.output_bias)


def joined(heads: torch.Tensor, bias: torch.Tensor | None = None) -> Affine:
    """Puts [heads, hidden, head_dim] side by side, as a weight [out, in] with its bias (or zeros)."""
    weight = heads.transpose(1, 2).flatten(0, 1)
    return Affine(weight, torch.zeros_like(weight[:, 0]) if bias is None else bias.flatten())


def _output(heads: Heads, output: torch.Tensor, value_bias: torch.Tensor | None = None) -> Affine:
    """Makes the output's map, with the bias that gives the old result for constant values.

    The weights of attention sum to one, so a value's bias passes through it as it is.
    """
    bias = heads.output_bias + torch.einsum("hi,hij->j", heads.value_bias, heads.output)
    if value_bias is not None:
        bias = bias - torch.einsum("hi,hij->j", value_bias, output)
    return Affine(output.flatten(0, 1).T, bias)


def nearest_rotation(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Finds the orthogonal R [..., n, n] that brings matrix·R closest to target, both [..., m, n] (Procrustes)."""
    left, _, right = torch.linalg.svd(matrix.transpose(-1, -2) @ target)
    return left @ right


@dataclass
class Metric:
    """The inputs' autocorrelation as a root and its inverse, in which plain least squares weighs by the inputs."""

    root: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, autocorrelation: torch.Tensor) -> "Metric":
        """Takes the roots of [n, n]; directions that the inputs hardly have are counted with a share of the mean."""
        eigenvalues, vectors = torch.linalg.eigh(autocorrelation)
        eigenvalues = eigenvalues.clamp(min=0) + _SHRINKAGE * eigenvalues.mean().clamp(min=1e-12)
        root = eigenvalues.sqrt()
        return cls(vectors * root @ vectors.T, vectors / root @ vectors.T)

    def reduce(self, *matrices: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Expresses [..., n, k] matrices in one orthonormal basis of what they span in this metric.

        Returns:
            The matrix [..., n, r] that takes coordinates back, and each matrix's coordinates [..., r, k].
        """
        weighed = [self.root @ matrix for matrix in matrices]
        basis = torch.linalg.qr(torch.cat(weighed, dim=-1)).Q
        return self.inverse @ basis, [basis.mT @ matrix for matrix in weighed]


def _largest(symmetric: torch.Tensor, number: int) -> torch.Tensor:
    """Gives the eigenvectors [..., r, number] with the largest eigenvalues."""
    return torch.linalg.eigh(symmetric).eigenvectors[..., -number:]


def _positive_part(symmetric: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(symmetric)
    return vectors * eigenvalues.clamp(min=0)[..., None, :] @ vectors.mT


def _relative(gram: torch.Tensor) -> torch.Tensor:
    return gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)[..., None, None]


def _two_sided_subspace(logits: torch.Tensor, number: int, result: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Finds the P [..., r, number] with the largest ‖Pᵀ·A·P‖² + tr(Pᵀ·result·P)."""
    inside = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    for _ in range(_ITERATIONS):
        gram = logits @ inside @ logits.mT + logits.mT @ inside @ logits
        subspace = _largest(gram + result, number)
        inside = subspace @ subspace.mT
    return subspace


def fit_scheme(
    layer: DenseAttention, config: SharedAttentionConfig, autocorrelation: torch.Tensor | None = None
) -> FittedLayer:
    """Fits the scheme of `config` to a stock layer; see the table above.

    Args:
        layer: with as many key as query heads.
        config: of the new model. Where it groups the heads of key and value, ``standard`` takes each group's mean,
            once its heads are rotated to agree, and ``shared_kv`` one subspace for the group.
        autocorrelation: the mean of x·xᵀ over the layer's inputs, [hidden, hidden]; None takes the identity.
    """
    heads = Heads.of(layer, config.hidden_size // config.num_attention_heads)
    scale = config.scheme.scale if config.attention_scale is None else config.attention_scale
    heads.query, heads.query_bias = heads.query / scale, heads.query_bias / scale
    if autocorrelation is None:
        autocorrelation = torch.eye(config.hidden_size, dtype=torch.float64, device=heads.query.device)
    return FITS[config.attention_scheme](heads, autocorrelation, config)


def _fit_standard(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    groups = config.num_attention_heads // config.num_key_value_heads
    rotation, key = _mean_of_groups(heads.key, groups)
    query_bias = (heads.query_bias[:, None] @ rotation).squeeze(1)
    return FittedLayer(
        {
            "q": joined(heads.query @ rotation, query_bias),
            "k": joined(key, heads.key_bias if groups == 1 else None),
            **_grouped_value(heads, groups),
        }
    )


def _grouped_value(heads: Heads, groups: int) -> dict[str, Affine]:
    rotation, value = _mean_of_groups(heads.value, groups)
    bias = heads.value_bias if groups == 1 else None
    return {"v": joined(value, bias), "o": _output(heads, rotation.mT @ heads.output, bias)}


def _mean_of_groups(matrix: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates heads [heads, hidden, head_dim] towards the mean of their group; gives rotations and means."""
    rotation = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand(len(matrix), -1, -1)
    for _ in range(_ITERATIONS if groups > 1 else 1):
        mean = (matrix @ rotation).unflatten(0, (-1, groups)).mean(1)
        if groups > 1:
            rotation = nearest_rotation(matrix, mean.repeat_interleave(groups, 0))
    return rotation, mean


def _fit_symmetric(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    metric = Metric.of(autocorrelation)
    back, (query, key) = metric.reduce(heads.query, heads.key)
    logits = query @ key.mT
    eigenvalues, vectors = torch.linalg.eigh((logits + logits.mT) / 2)
    number = heads.query.shape[-1]
    new = back @ (vectors[..., -number:] * eigenvalues[..., None, -number:].clamp(min=0).sqrt())
    return FittedLayer({"q": joined(new, _query_bias(heads, metric, new)), **_grouped_value(heads, 1)})


def _fit_pairwise(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    metric = Metric.of(autocorrelation)
    back, (query, key) = metric.reduce(heads.query, heads.key)
    logits = query @ key.mT
    subspace = _two_sided_subspace(logits, heads.query.shape[-1])
    inside = subspace.mT @ logits @ subspace
    new = back @ subspace
    size = _size_of(heads.query, heads.key) / _size_of(new)
    new, pairwise = new * size, inside.mT / size**2  # q·kᵀ = q·Uᵀ·qᵀ
    bias = _query_bias(heads, metric, new @ pairwise)
    return FittedLayer({"q": joined(new, bias), **_grouped_value(heads, 1)}, {"pairwise": pairwise})


def _fit_shared(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    has_diagonals = isinstance(config.scheme.ingredient, Diagonals)
    metric = Metric.of(autocorrelation)
    back, (query, key, value) = metric.reduce(heads.query, heads.key, heads.value)
    logits = query @ key.mT
    logits = (logits + logits.mT) / 2
    result = _relative(value @ heads.output @ heads.output.mT @ value.mT)
    reachable = logits if has_diagonals else _positive_part(logits)
    size = logits.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    subspace = _two_sided_subspace(reachable / size, heads.query.shape[-1], result)
    eigenvalues, vectors = torch.linalg.eigh(subspace.mT @ logits @ subspace)
    subspace = subspace @ vectors
    if has_diagonals:
        size = _size_of(heads.query, heads.key, heads.value) / _size_of(back @ subspace)
        size = size.expand(-1, 1, subspace.shape[-1])
    else:
        largest = eigenvalues.abs().amax(-1, keepdim=True).clamp(min=1e-3)  # a pruned head's are zero
        eigenvalues = torch.maximum(eigenvalues, _LEAST_EIGENVALUE * largest)
        size = eigenvalues[:, None].sqrt()
    new = back @ subspace * size
    weights = eigenvalues[:, None] / size**2  # of the channels in the logits: d_q·d_k, or ones
    bias = _query_bias(heads, metric, new * weights)
    output = subspace.mT @ value @ heads.output / size.mT
    matrices = {"s": joined(new, bias), "o": _output(heads, output, bias)}
    if not has_diagonals:
        return FittedLayer(matrices)
    root = weights.abs().sqrt()
    diagonals = {"query": root * weights.sign(), "key": root, "value": torch.ones_like(root)}
    return FittedLayer(matrices, {f"{role}_diagonal": diagonal.flatten() for role, diagonal in diagonals.items()})


def _fit_shared_kv(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    metric = Metric.of(autocorrelation)
    groups = config.num_attention_heads // config.num_key_value_heads

    def of_group(matrix):  # [heads, n, k] → [key_value_heads, n, groups * k]
        return matrix.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2)

    def per_head(matrix):  # [key_value_heads, …] → [heads, …]
        return matrix.repeat_interleave(groups, 0)

    back, _ = metric.reduce(of_group(heads.key), of_group(heads.value))
    into = per_head((metric.root @ metric.root @ back).mT)  # back is C^-½·basis; its coordinates are basisᵀ·C^½
    query, key, value = metric.root @ heads.query, into @ heads.key, into @ heads.value
    gram = _relative(key @ (query.mT @ query) @ key.mT) + _relative(value @ heads.output @ heads.output.mT @ value.mT)
    subspace = _largest(gram.unflatten(0, (-1, groups)).sum(1), heads.key.shape[-1])
    size = _size_of(heads.key, heads.value).unflatten(0, (-1, groups)).mean(1) / _size_of(back @ subspace)
    coordinates = per_head(subspace.mT)
    new = back @ subspace * size
    new_query = heads.query @ (coordinates @ key).mT / per_head(size)
    output = coordinates @ value @ heads.output / per_head(size)
    bias = _query_bias(heads, metric, per_head(new))
    return FittedLayer({"q": joined(new_query, bias), "k": joined(new), "o": _output(heads, output)})


def _slice_regression(heads: Heads, autocorrelation: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Predicts x·matrix of each head from its slice of x: [heads, head_dim, head_dim]."""
    number, head_dim = len(matrix), matrix.shape[-1]
    rows = autocorrelation.unflatten(0, (number, head_dim))
    blocks = torch.stack([rows[h, :, h * head_dim : (h + 1) * head_dim] for h in range(number)])
    # A few tokens may not fill the slice.
    shrinkage = 1e-6 * autocorrelation.diagonal().mean() * torch.eye(head_dim).to(blocks)
    return torch.linalg.solve(blocks + shrinkage, rows @ matrix)


def _fit_query_free(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    groups = config.num_attention_heads // config.num_key_value_heads
    key = heads.key @ _slice_regression(heads, autocorrelation, heads.query).mT
    return FittedLayer({"k": joined(key.unflatten(0, (-1, groups)).mean(1)), **_grouped_value(heads, groups)})


def _fit_key_free(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    key = _slice_regression(heads, autocorrelation, heads.key)
    query = joined(heads.query @ key.mT, (key @ heads.query_bias[..., None]).squeeze(-1))
    return FittedLayer({"q": query, **_grouped_value(heads, 1)})


def _fit_value_free(heads: Heads, autocorrelation: torch.Tensor, config) -> FittedLayer:
    value = _slice_regression(heads, autocorrelation, heads.value)
    return FittedLayer(
        {
            "q": joined(heads.query, heads.query_bias),
            "k": joined(heads.key, heads.key_bias),
            "o": _output(heads, value @ heads.output),
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
    """Finds the query bias [heads, head_dim] that adds to the logits of each key what the old one did."""
    target = heads.key @ heads.query_bias[..., None]
    return torch.linalg.lstsq(metric.root @ new_key, metric.root @ target, driver="gelsd").solution.squeeze(-1)


def _size_of(*matrices: torch.Tensor) -> torch.Tensor:
    """The root mean square of the entries of matrices [heads, …], by head: [heads, 1, 1]."""
    return torch.stack([m.square().mean((-2, -1), keepdim=True) for m in matrices]).mean(0).sqrt().clamp(min=1e-30)
