"""The config fields of attention: its scheme, and what its layers share. They are the same in every model."""

import math
from functools import wraps
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils.type_validators import interval

from .schemes import SCHEMES, Scheme

# The values of `depth_sharing`, and the field that sizes each.
DEPTH_SHARING = {
    "none": None,
    "masa": "num_atoms",
    "sequential": "num_groups",
    "repeat_all_over": "num_groups",
    "low_rank": "rank",
}
# A config file could name a kernel of the Hub, whose code would run, or a pickle: only the caller sets these.
_CALLERS_CHOICE = ("attn_implementation", "_attn_implementation", "transformers_weights")
# Fields that `with_attention` resets.
_CHOICES = (
    "attention_scheme", "attention_scale", "num_key_value_heads", "depth_sharing", "depth_shared_matrices",
    "num_atoms", "num_groups", "rank", "layer_ranks", "coefficient_source",
)  # fmt: skip


def checked(cls: type) -> type:
    """Make a config class `strict`, as transformers does, but with a ValueError where a value is wrong."""
    cls = strict(cls)

    def with_value_errors(method):
        @wraps(method)
        def wrapper(*args):
            try:
                method(*args)
            except StrictDataclassClassValidationError as error:  # of a method below, whose own error says all
                raise ValueError(str(error.__cause__)) from error
            except StrictDataclassError as error:
                raise ValueError(" ".join(str(error).split())) from error

        return wrapper

    cls.__setattr__, cls.validate = with_value_errors(cls.__setattr__), with_value_errors(cls.validate)
    return cls


def check_sizes(depth_sharing: str, sizes: dict[str, Any], limits: dict[str, int]):
    """Raise a ValueError for sizes that `depth_sharing` does not take, or needs and lacks.

    Args:
        sizes: num_atoms, num_groups, rank and layer_ranks, or None.
        limits: the number of layers and the largest rank, by the names that an error gives them.
    """
    needed = DEPTH_SHARING[depth_sharing]
    allowed = {needed} if depth_sharing == "none" else {needed, "rank", "layer_ranks"}
    for field, value in sizes.items():
        if value is not None and field not in allowed:
            users = ", ".join(name for name, size in DEPTH_SHARING.items() if size == field)
            raise ValueError(
                f"{field}={value} does not go with depth_sharing={depth_sharing!r}"
                + (f"; it goes with {users}" if users else "")
            )
    if depth_sharing == "none":
        return
    if sizes[needed] is None and not (needed == "rank" and sizes["layer_ranks"]):
        raise ValueError(f"depth_sharing={depth_sharing!r} needs {needed}")
    layers, largest = limits.items()
    for field, (of, most) in {"num_atoms": layers, "num_groups": layers, "rank": largest}.items():
        value = sizes[field]
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{field}={value} must be at least 1 and at most {of}={most}")


@checked
class SharedAttentionConfig(PreTrainedConfig):
    """Fields of `SelfAttention`, checked when a config is made and when it is saved.

    Args:
        attention_scheme: a key of `schemes.SCHEMES`.
        attention_scale: factor on the usual 1/sqrt(head_dim) of the logits; None takes the scheme's own
            (½ for ``query_free``, else 1).
        attention_bias: whether the projections and the output matrix have biases. Diagonals and pairwise
            matrices never have one.
        num_key_value_heads: fewer heads for key and value (grouped queries); None means as many as queries.
        diagonal_init_std: the diagonals of ``shared`` start at N(1, std²); 0 starts them at one, where the
            scheme is ``unified``.
        pairwise_init: "normal" starts each U of ``pairwise`` at N(0, 1), as its authors do; "identity" starts
            it as ``symmetric``.
        depth_sharing: how the matrices are stored over the layers: "none" (each layer has its own), "masa",
            "sequential", "repeat_all_over" (see `depth_sharing`) or "low_rank" (see `projections`). Biases,
            diagonals and pairwise matrices stay each layer's own.
        depth_shared_matrices: "qkv" stores those behind query, key and value so, "qkvo" the output's too.
        num_atoms: matrices in each dictionary of "masa", at most the number of layers.
        num_groups: groups of layers in "sequential" and "repeat_all_over", at most the number of layers.
        rank: of "low_rank". With the others, the rank of what each layer adds to its shared matrices; None adds
            nothing.
        layer_ranks: the rank of each matrix, [layers][matrices], where `rank` is not the same for all. The
            matrices of a layer stand in the order of `Scheme.matrices`, the output last if it is shared.
        coefficient_source: "direct" makes the coefficients of "masa" parameters; "network" makes them from an
            embedding of the layer by a small network while training.
        coefficient_init: "depth" starts each layer of "masa" between the two atoms nearest to it in depth;
            "normal" with a random direction.

    Raises:
        ValueError: naming the field, for an invalid value or combination.
    """

    # The class of the model's file for each Auto class.
    auto_classes: ClassVar[dict[str, str]] = {}

    hidden_size: int = interval(min=1)(default=768)
    num_hidden_layers: int = interval(min=1)(default=12)
    num_attention_heads: int = interval(min=1)(default=12)
    attention_scheme: str = "standard"
    attention_scale: float | int | None = None
    attention_bias: bool = True
    num_key_value_heads: int | None = None
    diagonal_init_std: float | int = 0.0
    pairwise_init: Literal["normal", "identity"] = "normal"
    depth_sharing: Literal[tuple(DEPTH_SHARING)] = "none"
    depth_shared_matrices: Literal["qkv", "qkvo"] = "qkv"
    num_atoms: int | None = None
    num_groups: int | None = None
    rank: int | None = None
    layer_ranks: list[list[int]] | None = None
    coefficient_source: Literal["direct", "network"] = "direct"
    coefficient_init: Literal["depth", "normal"] = "depth"
    attention_probs_dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    initializer_range: float | int = 0.02

    @property
    def scheme(self) -> Scheme:
        """The row of `SCHEMES`.

        Raises:
            ValueError: the name is unknown.
        """
        if self.attention_scheme not in SCHEMES:
            raise ValueError(
                f"attention_scheme={self.attention_scheme!r} is unknown; choose one of {', '.join(SCHEMES)}"
            )
        return SCHEMES[self.attention_scheme]

    def _tensor_parallel_plan(self, attention: str, first: str, second: str) -> dict[str, str]:
        """Return how each layer's matrices are split over processes, by the names of its attention and of its MLP.

        The MLP stays split between its two matrices. Attention's are gathered: where a role is the input itself, or
        two roles are one tensor, heads cannot be split by columns. Matrices that layers share are not split.
        """
        cut = {"projection": "colwise_gather_output", "output": "rowwise_split_input"}
        own = {f"{attention}.{name}": style for name, style in cut.items() if name not in self.shared_maps}
        return {**own, first: "colwise", second: "rowwise"}

    @property
    def sharing_names(self) -> list[str]:
        """The attention scheme, and the depth sharing if there is one."""
        return [name for name in (self.attention_scheme, self.depth_sharing) if name != "none"]

    @property
    def is_stock(self) -> bool:
        """Whether attention has the stock model's matrices."""
        grouped = self.num_key_value_heads != self.num_attention_heads
        return self.attention_scheme == "standard" and self.depth_sharing == "none" and not grouped

    def with_attention(self, **fields) -> "SharedAttentionConfig":
        """Return a config of the same shape, biases and head, with standard attention except for `fields`."""
        kept = {name: value for name, value in self.to_dict().items() if name not in (*_CHOICES, "model_type")}
        return type(self)(**kept | {"attention_scheme": "standard"} | fields)

    @property
    def shared_maps(self) -> tuple[str, ...]:
        """The linear maps of a layer that `depth_sharing` applies to."""
        if self.depth_sharing == "none":
            return ()
        return ("projection", "output") if self.depth_shared_matrices == "qkvo" else ("projection",)

    def matrix_widths(self, map_name: str) -> dict[str, int]:
        """Return the widths of the matrices in the "projection" or the "output", by name."""
        if map_name == "output":
            return {"o": self.hidden_size}
        key_value_size = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        return {
            matrix: self.hidden_size if matrix == self.scheme.query else key_value_size
            for matrix in self.scheme.matrices
        }

    @property
    def shared_widths(self) -> dict[str, int]:
        """The widths of the matrices that `depth_sharing` applies to, by name."""
        return {name: width for shared in map(self.matrix_widths, self.shared_maps) for name, width in shared.items()}

    def matrix_ranks(self, layer_idx: int, map_name: str) -> list[int]:
        """Return the ranks of the low-rank matrices in a layer's "projection" or "output"; 0 for none."""
        number = len(self.scheme.matrices)
        if self.layer_ranks is not None:
            ranks = self.layer_ranks[layer_idx]
            return ranks[number:] if map_name == "output" else ranks[:number]
        return [self.rank or 0] * len(self.matrix_widths(map_name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # transformers would set the fields among the keywords afterwards, one by one and unchecked.
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        given = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        stated = {name: value for name, value in config_dict.items() if name not in _CALLERS_CHOICE}
        return super().from_dict({**stated, **given}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is saved: `num_key_value_heads` only where queries are grouped, so that it follows the heads."""
        values = super().to_diff_dict()
        if self.num_key_value_heads == self.num_attention_heads:
            values.pop("num_key_value_heads", None)
        return values

    def save_pretrained(self, save_directory, **kwargs):
        """Save the config with an `auto_map`, by which the Auto classes find the code next to the weights."""
        # An existing entry may name another repository's code ("repository--file.Class"), or a subclass of the user's.
        named = {auto: cls for auto, cls in (getattr(self, "auto_map", None) or {}).items() if "--" not in cls}
        models = {auto: f"modeling_{self.model_type}.{name}" for auto, name in self.auto_classes.items()}
        self.auto_map = {**models, **named}
        super().save_pretrained(save_directory, **kwargs)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    # Methods of this name are called by `strict`.
    def validate_attention(self):
        """Raise a ValueError for an invalid scheme, scale or number of heads."""
        self.scheme  # noqa: B018 - names the valid ones
        if self.attention_scale is not None and not 0 < self.attention_scale < math.inf:
            raise ValueError(f"attention_scale={self.attention_scale} must be finite and above 0, or None")
        if not 0 <= self.diagonal_init_std < math.inf:
            raise ValueError(f"diagonal_init_std={self.diagonal_init_std} must be finite and at least 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads != self.num_attention_heads and not self.scheme.can_group:
            groupable = ", ".join(name for name, row in SCHEMES.items() if row.can_group)
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} groups queries, but attention_scheme="
                f"{self.attention_scheme!r} makes its key or value with the query's matrix or takes the input, "
                f"which have num_attention_heads={self.num_attention_heads} heads; use one of {groupable}"
            )

    def validate_depth_sharing(self):
        """Raise a ValueError for fields that `depth_sharing` does not take, or needs and lacks."""
        sizes = {field: getattr(self, field) for field in ("num_atoms", "num_groups", "rank", "layer_ranks")}
        limits = {name: getattr(self, name) for name in ("num_hidden_layers", "hidden_size")}
        check_sizes(self.depth_sharing, sizes, limits)
        if self.coefficient_source == "network" and self.depth_sharing != "masa":
            raise ValueError(
                f"coefficient_source='network' makes the coefficients of 'masa', which depth_sharing="
                f"{self.depth_sharing!r} does not have"
            )
        if self.layer_ranks is not None:
            self._check_layer_ranks()

    def _check_layer_ranks(self):
        if self.rank is not None:
            raise ValueError(f"rank={self.rank} and layer_ranks exclude each other: give one of the two")
        number = len(self.shared_widths)
        shape = f"num_hidden_layers={self.num_hidden_layers} lists of {number} ranks"
        if len(self.layer_ranks) != self.num_hidden_layers or any(len(row) != number for row in self.layer_ranks):
            raise ValueError(f"layer_ranks={self.layer_ranks} must be {shape}")
        if not all(0 <= rank <= self.hidden_size for row in self.layer_ranks for rank in row):
            raise ValueError(f"layer_ranks={self.layer_ranks} must lie between 0 and hidden_size={self.hidden_size}")
