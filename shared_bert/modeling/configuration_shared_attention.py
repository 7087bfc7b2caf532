"""The config fields that say how attention makes its query, key and value, and what its layers share.

They are the same in every model.
"""

import difflib
import math
from dataclasses import fields
from functools import wraps
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .schemes import SCHEMES, Scheme

# The ways of sharing over the depth, and the field that says of how much each is made.
DEPTH_SHARING = {
    "none": None,
    "masa": "num_atoms",
    "sequential": "num_groups",
    "repeat_all_over": "num_groups",
    "low_rank": "rank",
}
_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
# What a value must be, whatever the others are. Types are checked besides, but not of the base class's fields.
_VALID = (
    (
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "type_vocab_size", "num_labels",
        ),
        lambda number: type(number) is int and 1 <= number < 2**31,
        "a number of at least 1 and below 2147483648",
    ),
    (("num_hidden_layers",), lambda number: 1 <= number <= 10_000, "at least 1 and at most 10000"),
    (
        ("attention_probs_dropout_prob", "hidden_dropout_prob"),
        lambda share: 0 <= share < 1,
        "at least 0 and below 1",
    ),
    (
        ("classifier_dropout",),
        lambda share: share is None or 0 <= share < 1,
        "at least 0 and below 1, or None",
    ),
    (("diagonal_init_std", "initializer_range"), lambda std: 0 <= std < math.inf, "a finite number, 0 or more"),
    (("layer_norm_eps",), lambda number: 0 < number < math.inf, "a finite number above 0"),
    (
        ("attention_scale",),
        lambda number: number is None or 0 < number < math.inf,
        "a finite number above 0, or None",
    ),
    (("attention_scheme",), SCHEMES.__contains__, f"one of {', '.join(SCHEMES)}"),
    (("pairwise_init",), ("normal", "identity").__contains__, "normal or identity"),
    (("depth_sharing",), DEPTH_SHARING.__contains__, f"one of {', '.join(DEPTH_SHARING)}"),
    (("depth_shared_matrices",), ("qkv", "qkvo").__contains__, "qkv or qkvo"),
    (("coefficient_source",), ("direct", "network").__contains__, "direct or network"),
    (("coefficient_init",), ("depth", "normal").__contains__, "depth or normal"),
    (("hidden_act",), ACT2FN.__contains__, f"one of {', '.join(ACT2FN)}"),
    (
        ("dtype",),
        lambda name: name is None or isinstance(getattr(torch, str(name).removeprefix("torch."), None), torch.dtype),
        "a type of torch, such as float32, or None",
    ),
    (
        ("id2label",),
        lambda names: names is None or (isinstance(names, dict) and names and all(str(i).isdecimal() for i in names)),
        "names of the labels 0, 1 …, or None",
    ),
    (
        ("output_attentions", "output_hidden_states", "return_dict"),
        lambda flag: flag is None or type(flag) is bool,
        "True, False or None",
    ),
    (
        ("layer_types",),
        lambda names: names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
        "a list of names, or None",
    ),
    (
        ("auto_map",),
        lambda names: names is None
        or (isinstance(names, dict) and all(isinstance(name, (str, list, tuple)) for name in names.values())),
        "names of classes by their Auto class, or None",
    ),
    (("problem_type",), _PROBLEM_TYPES.__contains__, "one of " + ", ".join(map(str, _PROBLEM_TYPES))),
)  # fmt: skip
# What a config file does not decide: it could name a kernel of the Hub, whose code would run, or a pickle.
_CALLERS_CHOICE = ("attn_implementation", "_attn_implementation", "transformers_weights")
# A keyword this like a field's name, and no field, is that field misspelt. What transformers itself hands on, sets and
# saves is less like any (`layer_norm_epsilon`, at 0.875, comes nearest); all else stays allowed, as in every config of
# transformers.
_MISSPELT = 0.88
# What `with_attention` does not keep.
_CHOICES = (
    "attention_scheme", "attention_scale", "num_key_value_heads", "depth_sharing", "depth_shared_matrices",
    "num_atoms", "num_groups", "rank", "layer_ranks", "coefficient_source",
)  # fmt: skip


def checked(cls: type) -> type:
    """Makes a config class `strict`, with ValueErrors in place of errors of a kind that nobody expects."""
    cls = strict(cls)
    cls.__setattr__, cls.validate = _with_value_errors(cls.__setattr__), _with_value_errors(cls.validate)
    return cls


def _with_value_errors(method):
    @wraps(method)
    def wrapper(*args):
        try:
            method(*args)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from error

    return wrapper


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
        ValueError: naming the field, for a value or a combination that has no meaning.
    """

    # Which class of the model's file serves which Auto class.
    auto_classes: ClassVar[dict[str, str]] = {}

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    attention_scheme: str = "standard"
    attention_scale: float | int | None = None
    attention_bias: bool = True
    num_key_value_heads: int | None = None
    diagonal_init_std: float | int = 0.0
    pairwise_init: str = "normal"
    depth_sharing: str = "none"
    depth_shared_matrices: str = "qkv"
    num_atoms: int | None = None
    num_groups: int | None = None
    rank: int | None = None
    layer_ranks: list[list[int]] | None = None
    coefficient_source: str = "direct"
    coefficient_init: str = "depth"
    attention_probs_dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    initializer_range: float | int = 0.02

    @property
    def scheme(self) -> Scheme:
        if self.attention_scheme not in SCHEMES:
            raise ValueError(
                f"attention_scheme={self.attention_scheme!r} is unknown; choose one of {', '.join(SCHEMES)}"
            )
        return SCHEMES[self.attention_scheme]

    def _tensor_parallel_plan(self, attention: str, first: str, second: str) -> dict[str, str]:
        """Plans how each layer's matrices are cut over processes, by the names of its attention and of its MLP.

        The MLP stays cut between its two matrices. Attention's are gathered: where a role is the input itself, or two
        roles are one tensor, heads cannot be dealt out by columns. What layers share is not cut.
        """
        cut = {"projection": "colwise_gather_output", "output": "rowwise_split_input"}
        own = {f"{attention}.{name}": style for name, style in cut.items() if name not in self.shared_maps}
        return {**own, first: "colwise", second: "rowwise"}

    @property
    def is_stock(self) -> bool:
        """Whether attention is the stock model's, matrix by matrix."""
        grouped = self.num_key_value_heads != self.num_attention_heads
        return self.attention_scheme == "standard" and self.depth_sharing == "none" and not grouped

    def with_attention(self, **fields) -> "SharedAttentionConfig":
        """Makes a config of the same shape, biases and head, whose attention is standard but for `fields`."""
        kept = {name: value for name, value in self.to_dict().items() if name not in (*_CHOICES, "model_type")}
        return type(self)(**kept | {"attention_scheme": "standard"} | fields)

    @property
    def shared_maps(self) -> tuple[str, ...]:
        """Which linear maps of a layer `depth_sharing` is about."""
        if self.depth_sharing == "none":
            return ()
        return ("projection", "output") if self.depth_shared_matrices == "qkvo" else ("projection",)

    def matrix_widths(self, linear: str) -> dict[str, int]:
        """Names the matrices that lie side by side in the "projection" or the "output", with their widths."""
        if linear == "output":
            return {"o": self.hidden_size}
        key_value_size = self.hidden_size // self.num_attention_heads * self.num_key_value_heads
        return {
            matrix: self.hidden_size if matrix == self.scheme.query else key_value_size
            for matrix in self.scheme.matrices
        }

    def matrix_ranks(self, layer_idx: int, linear: str) -> list[int]:
        """Ranks of the low-rank matrices in a layer's "projection" or "output"; 0 where there are none."""
        number = len(self.scheme.matrices)
        if self.layer_ranks is not None:
            ranks = self.layer_ranks[layer_idx]
            return ranks[number:] if linear == "output" else ranks[:number]
        return [self.rank or 0] * len(self.matrix_widths(linear))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # transformers would set the fields among the keywords afterwards, one by one and unchecked.
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        given = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        stated = {name: value for name, value in config_dict.items() if name not in _CALLERS_CHOICE}
        return super().from_dict({**stated, **given}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Gives what is saved: `num_key_value_heads` only where queries are grouped, so that it follows the heads."""
        values = super().to_diff_dict()
        if self.num_key_value_heads == self.num_attention_heads:
            values.pop("num_key_value_heads", None)
        return values

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the config, with where each Auto class finds its class in the code that goes with the weights."""
        # What is there may name another repository's code ("repository--file.Class"), or a subclass of the user's.
        named = {auto: cls for auto, cls in (getattr(self, "auto_map", None) or {}).items() if "--" not in cls}
        models = {auto: f"modeling_{self.model_type}.{name}" for auto, name in self.auto_classes.items()}
        self.auto_map = {**models, **named}
        super().save_pretrained(save_directory, **kwargs)

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        names = [field.name for field in fields(self)]
        for name in kwargs:
            if nearest := difflib.get_close_matches(name, names, n=1, cutoff=_MISSPELT):
                raise ValueError(f"{name} is no field of {type(self).__name__}; the nearest one is {nearest[0]}")
            attribute = getattr(type(self), name, None)
            if callable(attribute) or (isinstance(attribute, property) and attribute.fset is None):
                raise ValueError(f"{name} is no field of {type(self).__name__}, but part of its class: leave it out")
        _check_values({**vars(self), **kwargs})  # before the base class works with them
        super().__post_init__(**kwargs)

    def validate_fields(self):
        """Raises the ValueErrors of this class: a method of this name is called by `strict`."""
        _check_values({**vars(self), "num_labels": self.num_labels})
        self._check_attention()
        self._check_depth_sharing()

    def _check_attention(self):
        pad_token_id, vocab_size = (getattr(self, field, None) for field in ("pad_token_id", "vocab_size"))
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"pad_token_id={pad_token_id} must be at least 0 and below vocab_size={vocab_size}, or None"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.num_key_value_heads != self.num_attention_heads and not self.scheme.can_group:
            groupable = ", ".join(name for name, row in SCHEMES.items() if row.can_group)
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} groups queries, but attention_scheme="
                f"{self.attention_scheme!r} takes its key or value from the query's matrix or from the input, "
                f"which have num_attention_heads={self.num_attention_heads} heads; it can be had with {groupable}"
            )

    def _check_depth_sharing(self):
        needed = DEPTH_SHARING[self.depth_sharing]
        allowed = {needed} if self.depth_sharing == "none" else {needed, "rank", "layer_ranks"}
        for field in ("num_atoms", "num_groups", "rank", "layer_ranks"):
            value = getattr(self, field)
            if value is not None and field not in allowed:
                users = ", ".join(name for name, size in DEPTH_SHARING.items() if size == field)
                raise ValueError(
                    f"{field}={value} has no meaning with depth_sharing={self.depth_sharing!r}"
                    + (f"; it goes with {users}" if users else "")
                )
        if self.depth_sharing == "none":
            return
        if getattr(self, needed) is None and not (needed == "rank" and self.layer_ranks):
            raise ValueError(f"depth_sharing={self.depth_sharing!r} needs {needed}")
        for field, most, of in (
            ("num_atoms", self.num_hidden_layers, "num_hidden_layers"),
            ("num_groups", self.num_hidden_layers, "num_hidden_layers"),
            ("rank", self.hidden_size, "hidden_size"),
        ):
            value = getattr(self, field)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{field}={value} must be at least 1 and at most {of}={most}")
        if self.coefficient_source == "network" and self.depth_sharing != "masa":
            raise ValueError(
                f"coefficient_source='network' makes the coefficients of 'masa'; depth_sharing={self.depth_sharing!r} "
                "has none"
            )
        if self.layer_ranks is not None:
            self._check_layer_ranks()

    def _check_layer_ranks(self):
        if self.rank is not None:
            raise ValueError(f"rank={self.rank} and layer_ranks say the same: give one of the two")
        number = sum(len(self.matrix_widths(linear)) for linear in self.shared_maps)
        shape = f"num_hidden_layers={self.num_hidden_layers} lists of {number} ranks"
        if len(self.layer_ranks) != self.num_hidden_layers or any(len(row) != number for row in self.layer_ranks):
            raise ValueError(f"layer_ranks={self.layer_ranks} must be {shape}")
        if not all(0 <= rank <= self.hidden_size for row in self.layer_ranks for rank in row):
            raise ValueError(f"layer_ranks={self.layer_ranks} must lie between 0 and hidden_size={self.hidden_size}")


def _check_values(values: dict[str, Any]):
    for names, is_valid, wanted in _VALID:
        for name in names:
            if name in values and not is_valid(values[name]):
                raise ValueError(f"{name}={values[name]!r} must be {wanted}")
