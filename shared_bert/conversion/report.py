"""What a conversion lost: the error of each layer's matrices."""

import math
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from .dense import DenseAttention, attention_layers, depth_sharing_of
from .fitting import Heads, nearest_rotation

COLUMNS = ("query", "key", "value", "output", "logits", "result")


@dataclass
class ConversionReport:
    """The result of `from_stock`; `str()` formats it as a table.

    Attributes:
        attention_scheme, depth_sharing: of the converted model.
        errors: for every layer, the relative errors ‖W' - W‖ / ‖W‖ of "query", "key", "value" and "output" (per head
            in the basis where old and new come closest: attention knows no other), and of the products that alone
            make a difference, "logits" (query · key, head by head) and "result" (value · output).
        measured_on: "inputs" where calibration text was given: the errors are of what query, key and value are for
            the layer's inputs, which is what was fitted; else "weights".
        parameters_before, parameters_after: of attention, biases included.
        total_before, total_after: of the whole model.
        layer_ranks: the ranks that were chosen, where they were spread.
        dictionary_groups: layers and atoms of each group of the dictionary.
    """

    attention_scheme: str
    depth_sharing: str
    errors: list[dict[str, float]]
    parameters_before: int
    parameters_after: int
    total_before: int
    total_after: int
    measured_on: str = "weights"
    layer_ranks: list[list[int]] | None = None
    dictionary_groups: list[tuple[int, int, int]] | None = None

    def all_errors(self) -> dict[str, float]:
        """Return the root mean square of the errors over the layers."""
        return {c: math.sqrt(sum(row[c] ** 2 for row in self.errors) / len(self.errors)) for c in COLUMNS}

    def to_dict(self) -> dict:
        return {**asdict(self), "all_errors": self.all_errors()}

    def __str__(self) -> str:
        rows = [(str(i), row) for i, row in enumerate(self.errors)] + [("all", self.all_errors())]
        lines = [
            f"{self.attention_scheme}, depth sharing {self.depth_sharing}: relative errors on {self.measured_on}",
            f"{'layer':>5}" + "".join(f"{column:>9}" for column in COLUMNS),
        ]
        lines += [f"{name:>5}" + "".join(f"{row[column]:9.4f}" for column in COLUMNS) for name, row in rows]
        if self.dictionary_groups:
            lines.append(f"layers and atoms of the dictionary's groups: {self.dictionary_groups}")
        if self.layer_ranks:
            lines.append(f"ranks of each layer's matrices: {self.layer_ranks}")
        lines.append(saved_line("attention", self.parameters_before, self.parameters_after))
        lines.append(saved_line("model", self.total_before, self.total_after))
        return "\n".join(lines)


def saved_line(name: str, before: int, after: int) -> str:
    """Return a line that says how many parameters are saved."""
    share = 1 - after / before
    return f"parameters of the {name}: {before:,} → {after:,} ({abs(share):.1%} {'fewer' if share >= 0 else 'more'})"


def attention_parameters(model: PreTrainedModel) -> int:
    """Count the parameters of a `Shared…` model's attention, and of what its layers share; biases included."""
    modules = [*attention_layers(model), depth_sharing_of(model)]
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def layer_errors(
    before: DenseAttention,
    after: DenseAttention,
    head_dim: int,
    head_order: torch.Tensor | None = None,
    root: torch.Tensor | None = None,
) -> dict[str, float]:
    """Compare two layers; see `ConversionReport`.

    Args:
        head_order: which head of `before` each head of `after` stands for.
        root: of the inputs' autocorrelation, [hidden, hidden]; None takes the identity.
    """
    old, new = Heads.of(before, head_dim), Heads.of(after, head_dim)
    if root is not None:
        for heads in (old, new):
            heads.query, heads.key, heads.value = root @ heads.query, root @ heads.key, root @ heads.value
    if head_order is not None:
        old = old.reordered(head_order)
    errors = {}
    for names, product in ((("query", "key"), "logits"), (("value", "output"), "result")):
        mine, theirs = (_pair(heads, product) for heads in (old, new))
        errors[product] = _relative_error(mine[0] @ mine[1].mT, theirs[0] @ theirs[1].mT)
        mine, theirs = _balanced(*mine), _balanced(*theirs)
        rotation = nearest_rotation(torch.cat(theirs, dim=1), torch.cat(mine, dim=1))
        for name, left, right in zip(names, mine, theirs, strict=True):
            errors[name] = _relative_error(left, right @ rotation)
    return {column: errors[column] for column in COLUMNS}


def _pair(heads: Heads, product: str) -> tuple[torch.Tensor, torch.Tensor]:
    return (heads.query, heads.key) if product == "logits" else (heads.value, heads.output.mT)


def _balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors [heads, hidden, head_dim] of left·rightᵀ that have the same singular values."""
    (left_basis, left), (right_basis, right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, values, v = torch.linalg.svd(left @ right.mT)
    root = values.sqrt()[:, None]
    return left_basis @ u * root, right_basis @ v.mT * root


def _relative_error(old: torch.Tensor, new: torch.Tensor) -> float:
    return float((new - old).norm() / old.norm().clamp(min=1e-30))
