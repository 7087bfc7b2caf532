"""The nearest layer of a scheme where queries and keys are rotated by their position (RoPE), without training.

A rotation acts on pairs of a head's channels, the planes (j, j + head_dim/2), as a factor e^{iθm} on a complex number
that has them as its parts. So the logits of a head are Σ_p Re(x·a_p · conj(y·b_p) · e^{iθ_p·Δ}), where a_p and b_p are
the complex columns of the query's and the key's matrix, and the planes can be fitted one by one: over all distances Δ
each knows the product a·bᴴ only. What commutes with the rotation is one complex factor per plane, in place of any
invertible matrix per head (see `fitting`, which also says what is minimised).

| scheme | product | solution per plane |
|---|---|---|
| ``symmetric`` | p·pᴴ | the largest eigenvalue of the product's Hermitian part and its vector |
| ``pairwise`` | ū·p·pᴴ | p between a and b, turned to the same phase; u the product within it |
| ``shared`` | e·p·pᴴ | the eigenvalue of the Hermitian part that is largest in size |
| ``unified`` | p·pᴴ | as ``symmetric`` |
| ``query_free`` | E·bᴴ | a regressed on E, the plane's slice of the input |
| ``key_free`` | a·Eᴴ | b regressed on E |
| ``shared_kv`` | a·bᴴ | the key stays |

Where the value is made from the query's or the key's matrix, the old value is regressed on it, head by head, and the
output takes the rest; a value from the input (``value_free``) is not rotated and is fitted as elsewhere. Unlike
elsewhere, the key's bias matters: both biases are fitted as one more channel of the input.
"""

import torch

from .dense import Affine, DenseAttention, SchemeLayer, repeat_heads
from .fitting import FITS, AttentionFields, Heads, Metric, least_squares, output_of

_LEAST = 1e-30


def fit_rotary_scheme(
    layer: DenseAttention, config: AttentionFields, autocorrelation: torch.Tensor | None = None
) -> SchemeLayer:
    """Fit the scheme of `config` to a layer whose queries and keys are rotated; see the table above.

    Args:
        layer, config, autocorrelation: as of `fit_scheme`.
    """
    size, hidden_size = layer.query.weight.shape
    head_dim = size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    if autocorrelation is None:
        autocorrelation = torch.eye(hidden_size, dtype=torch.float64, device=layer.query.weight.device)
    if config.attention_scheme == "value_free":
        return FITS["value_free"](Heads.of(layer, head_dim), Metric.of(autocorrelation), config)

    scheme, own = config.scheme, Metric.of(autocorrelation)
    metric = Metric.of(torch.block_diag(autocorrelation, torch.ones_like(autocorrelation[:1, :1])))
    root, inverse = metric.root.to(torch.complex128), metric.inverse.to(torch.complex128)
    query, key = (root @ _planes(role, head_dim) for role in (layer.query, layer.key))
    ingredient = {}
    if config.attention_scheme == "pairwise":
        vector, factor = _between(query, key)
        # As large as the matrices it stands for.
        scale = (_norm(query) * _norm(key)).clamp(min=_LEAST).sqrt()
        matrices = {"q": _affine(inverse @ vector * scale)}
        ingredient["pairwise"] = multiplication((factor.conj() / scale.square())[..., 0, 0])
    elif scheme.query == scheme.key:
        value, vector = _hermitian(query, key, both_signs=config.attention_scheme == "shared")
        matrices = {scheme.query: _affine(inverse @ vector * value.abs().sqrt())}
        if config.attention_scheme == "shared":
            signs = torch.where(value < 0, -1.0, 1.0).to(autocorrelation)[..., 0, 0]
            ones = torch.ones(size).to(autocorrelation)
            ingredient = {
                "query_diagonal": torch.cat([signs, signs], dim=1).flatten(),  # of both channels of a plane
                "key_diagonal": ones,
                "value_diagonal": ones,
            }
    elif scheme.query == "x":
        scale = scheme.scale if config.attention_scale is None else config.attention_scale
        factor = _regression(_input(root, head_dim), query, key, groups)
        matrices = {"k": _affine(inverse @ (key[::groups] * factor.conj()) / scale)}
    elif scheme.key == "x":
        factor = _regression(_input(root, head_dim), key, query, 1)
        matrices = {"q": _affine(inverse @ (query * factor.conj()))}
    else:
        matrices = {"q": layer.query, "k": _first_of_groups(layer.key, head_dim, groups)}
    matrices |= _value(layer, matrices.get(scheme.value), own, head_dim, groups)
    return SchemeLayer(matrices, ingredient)


def _planes(role: Affine, head_dim: int) -> torch.Tensor:
    """Return the complex columns of a role, the bias as one more channel, [heads, planes, hidden + 1, 1]."""
    rows = torch.column_stack([role.weight, role.bias]).unflatten(0, (-1, 2, head_dim // 2))
    return torch.complex(rows[:, 0], rows[:, 1])[..., None]


def _affine(planes: torch.Tensor) -> Affine:
    """Return the map that has these complex columns."""
    rows = torch.cat([planes.real, planes.imag], dim=1).flatten(0, 1)[..., 0]
    return Affine(rows[:, :-1], rows[:, -1])


def _input(root: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the complex columns of the input itself."""
    identity = torch.eye(len(root) - 1, dtype=torch.float64, device=root.device)
    return root @ _planes(Affine(identity, torch.zeros_like(identity[0])), head_dim)


def _norm(vectors: torch.Tensor) -> torch.Tensor:
    return vectors.norm(dim=-2, keepdim=True)


def _between(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the unit vector p with the largest |pᴴ·a·bᴴ·p|, and this product."""
    a_unit, b_unit = (vectors / _norm(vectors).clamp(min=_LEAST) for vectors in (a, b))
    overlap = b.mH @ a
    phase = torch.where(overlap.abs() > 0, overlap / overlap.abs().clamp(min=_LEAST), 1)
    vector = a_unit + b_unit * phase
    vector = vector / _norm(vector).clamp(min=_LEAST)
    return vector, (vector.mH @ a) * (b.mH @ vector)


def _hermitian(a: torch.Tensor, b: torch.Tensor, both_signs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest eigenvalue of the Hermitian part of a·bᴴ, at least 0 or largest in size, and its vector."""
    basis = torch.linalg.qr(torch.cat([a, b], dim=-1)).Q
    a, b = basis.mH @ a, basis.mH @ b
    values, vectors = torch.linalg.eigh((a @ b.mH + b @ a.mH) / 2)  # in rising order, one below and one above 0
    place = values.abs().argmax(-1) if both_signs else torch.ones_like(values[..., 0], dtype=torch.long)
    value = values.gather(-1, place[..., None])[..., None]
    vector = vectors.gather(-1, place[..., None, None].expand(*vectors.shape[:-1], 1))
    return value if both_signs else value.clamp(min=0), basis @ vector


def _regression(slices: torch.Tensor, role: torch.Tensor, other: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the factor that predicts a role from its slice of the input, one for all heads of a group."""
    weight = 1 / (_norm(role) * _norm(other)).square().clamp(min=_LEAST)  # each head relative to its own size
    products = (weight * (slices.mH @ role)).unflatten(0, (-1, groups)).sum(1)
    return products / (weight * _norm(slices).square()).unflatten(0, (-1, groups)).sum(1).clamp(min=_LEAST)


def multiplication(factor: torch.Tensor) -> torch.Tensor:
    """Return the matrices that multiply a head's planes, as row vectors, by `factor` [..., planes]."""
    real, imaginary = torch.diag_embed(factor.real), torch.diag_embed(factor.imag)
    return torch.cat([torch.cat([real, imaginary], dim=-1), torch.cat([-imaginary, real], dim=-1)], dim=-2)


def _first_of_groups(role: Affine, head_dim: int, groups: int) -> Affine:
    return Affine(*(t.unflatten(0, (-1, head_dim))[::groups].flatten(0, 1) for t in (role.weight, role.bias)))


def _value(
    layer: DenseAttention, made_from: Affine | None, metric: Metric, head_dim: int, groups: int
) -> dict[str, Affine]:
    """Return the value's matrix and the output's, or the output's for a value that another role's matrix makes."""
    if made_from is None:
        return {"v": _first_of_groups(layer.value, head_dim, groups), "o": layer.output}
    heads = Heads.of(layer, head_dim)
    new = repeat_heads(made_from, head_dim, len(layer.value.weight) // len(made_from.weight))
    new_heads = new.weight.unflatten(0, (-1, head_dim)).mT
    inside = least_squares(metric.root @ new_heads, metric.root @ heads.value)
    return {"o": output_of(heads, inside @ heads.output, new.bias.unflatten(0, (-1, head_dim)))}
