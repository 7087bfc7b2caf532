"""The keys of a comparison's YAML file and their types, which are checked when it is read; see configs/README.md."""

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ...training.yaml_files import check_keys, load_mapping

Part = TypeVar("Part")
MAX_SEED = 2**32 - 1  # of numpy
TUNED = ("learning_rate", "weight_decay")  # what a sweep can choose for each variant


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML file, over the keys of the file beside it that it `extends`, if any.

    Raises:
        ValueError: one of them cannot be read.
    """
    stated = load_mapping(path)
    extended = stated.pop("extends", None)
    if extended is None:
        return stated
    base = load_file(Path(path).parent / str(extended))
    merged = {
        key: {**base.get(key, {}), **stated[key]}
        for key in ("model", "training", "evaluation")
        if isinstance(stated.get(key), dict)
    }
    return {**base, **stated, **merged}


def read_part(cls: type[Part], stated: Any, where: str) -> Part:
    """Read a mapping into one of the dataclasses below.

    Raises:
        ValueError: it is no mapping, has an unknown key, lacks one, or a value is of the wrong type.
    """
    if not isinstance(stated, dict):
        raise ValueError(f"{where} must be keys and values, not {stated!r}")
    check_keys(stated, [f.name for f in fields(cls)], where)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if lacking := [name for name in needed if name not in stated]:
        raise ValueError(f"{where} lacks {', '.join(lacking)}")
    try:
        return cls(**stated)
    except StrictDataclassError as error:
        reason = error.__cause__ or error
        raise ValueError(f"{where}: {' '.join(str(reason).split())}") from error


def _check_positive(part: Any, *names: str):
    for name in names:
        if (value := getattr(part, name)) is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")


def _check_different(values: list | None, name: str, least: float, most: float = math.inf):
    if values is None:
        return
    if not values or not all(least <= value <= most for value in values):
        raise ValueError(f"{name}={values} must be numbers from {least:g} to {most:g}")
    if len({*values}) < len(values):
        raise ValueError(f"{name}={values} has one number twice")


@strict
@dataclass(kw_only=True)
class File:
    """The whole file; its parts are read by the classes below."""

    model: dict[str, Any]
    variants: list[Any]
    training: dict[str, Any]
    baseline: str | None = None
    narrow: bool = True
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    sweep: dict[str, Any] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    claims: list[Any] = field(default_factory=list)
    notes: str = ""
    output_dir: str | None = None
    results_dir: str | None = None

    def validate_seeds(self):
        _check_different(self.seeds, "seeds", 0, MAX_SEED)

    def validate_model(self):
        if not isinstance(self.model.get("model_type"), str):
            raise ValueError("model lacks model_type")

    def validate_variants(self):
        if not self.variants:
            raise ValueError("variants: there are none")


@strict
@dataclass(kw_only=True)
class Sweep:
    """Options that are tried on each variant.

    Args:
        learning_rate, weight_decay: values to try.
        seed: of these runs, which is none of those that are reported, so that these are not what was chosen by.
        max_steps: of these runs; else as many as of the others.
    """

    learning_rate: list[float | int] | None = None
    weight_decay: list[float | int] | None = None
    seed: int = 1000
    max_steps: int | None = None

    def validate_values(self):
        _check_positive(self, "max_steps")
        for name in TUNED:
            _check_different(getattr(self, name), name, 0)
        if not self.tried:
            raise ValueError(f"give values of {' or '.join(TUNED)}")

    @property
    def tried(self) -> dict[str, list[float]]:
        """The options with values to try."""
        return {name: values for name in TUNED if (values := getattr(self, name)) is not None}


@strict
@dataclass(kw_only=True)
class Texts:
    """Texts whose loss is measured, document by document.

    Args:
        files: a file for each name.
        max_documents: of each file, evenly spaced.
        window, stride: see `document_losses`; the window is else as long as the rows of training.
    """

    files: dict[str, str]
    max_documents: int | None = None
    window: int | None = None
    stride: int | None = None

    def validate_numbers(self):
        _check_positive(self, "max_documents", "window", "stride")


@strict
@dataclass(kw_only=True)
class Blimp:
    """Minimal pairs.

    Args:
        pairs: a parquet file in the columns of BLiMP.
        max_pairs: of each paradigm.
    """

    pairs: str
    max_pairs: int | None = None

    def validate_numbers(self):
        _check_positive(self, "max_pairs")


@strict
@dataclass(kw_only=True)
class Noise:
    """Accuracy on noisy embeddings; see `noise_accuracy`.

    Args:
        task: one of those that `glue` fine-tunes on.
    """

    task: str
    levels: list[float | int] = field(default_factory=lambda: [0.0, 0.2, 0.4])
    draws: int = 5

    def validate_numbers(self):
        _check_positive(self, "draws")
        _check_different(self.levels, "levels", 0)
        if self.levels[0] != 0:
            raise ValueError(f"levels={self.levels} must begin with 0, which the others are compared with")


@strict
@dataclass(kw_only=True)
class Claim:
    """What a paper says of variants, to be held against what is measured.

    Args:
        claim, source: in words, and where it is made.
        of: the variants it is about; "reduced" for all that have a narrower model beside them.
        against: what they are compared with: a variant, or "narrow", the narrower standard model of each.
        measure: "loss:" and the name of a text, "loss" without texts, "blimp", "glue:" and a task, "glue" for their
            mean, or "noise".
        expected: how `of` minus `against` should be.
        within: see `verdict`; "same" needs it.
    """

    claim: str
    source: str
    of: list[str] | str
    against: str
    measure: str
    expected: Literal["lower", "higher", "same"]
    within: float | int = 0

    def validate_margin(self):
        if self.expected == "same" and self.within <= 0:
            raise ValueError(f"within={self.within} must be above 0 where same is expected")
