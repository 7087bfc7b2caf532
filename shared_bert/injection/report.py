"""What sharing saves and loses."""

from dataclasses import asdict, dataclass, field

from ..conversion.depth_fitting import DictionaryGroups
from ..conversion.report import saved_line


@dataclass
class SharingReport:
    """The result of `share`; `str()` formats it as a table.

    Attributes:
        attention_scheme, depth_sharing: of the model.
        errors: for each target the relative error ‖W' - W‖ / ‖W‖ of every layer's matrix, on its inputs where
            calibration batches were given; empty for a model that is to be trained.
        parameters_before, parameters_after: of the targets, and of what takes their place.
        total_before, total_after: of the whole model.
        layer_ranks: the rank of each target's factors in every layer, where they were spread.
        dictionary_groups: first layer, layer after the last and atoms of each group of a stack's dictionaries, by the
            name of the stack's layers.
        aligned: the queries' names, in patterns, of the attention whose heads were aligned.
    """

    attention_scheme: str
    depth_sharing: str
    errors: dict[str, list[float]]
    parameters_before: int
    parameters_after: int
    total_before: int
    total_after: int
    layer_ranks: dict[str, list[int]] | None = None
    dictionary_groups: dict[str, DictionaryGroups] | None = None
    aligned: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.attention_scheme}, depth sharing {self.depth_sharing}"]
        for target, errors in self.errors.items():
            lines.append(f"{target}: relative errors " + " ".join(f"{error:.3f}" for error in errors))
        for name in ("dictionary_groups", "layer_ranks"):
            if getattr(self, name):
                lines += [f"{name} of {key}: {value}" for key, value in getattr(self, name).items()]
        if self.aligned:
            lines.append("heads aligned: " + ", ".join(self.aligned))
        lines.append(saved_line("matrices", self.parameters_before, self.parameters_after))
        lines.append(saved_line("model", self.total_before, self.total_after))
        return "\n".join(lines)
