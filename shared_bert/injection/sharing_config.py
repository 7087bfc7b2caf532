"""`SharingConfig`: what a stock model shares, as its config records it."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..modeling import SCHEMES, Scheme
from ..modeling.configuration_shared_attention import DEPTH_SHARING

METHOD = "shared_bert"
FORMAT = 1  # of the record; a later one may mean what this version does not know


@register_quantization_config(METHOD)
@dataclass
class SharingConfig(QuantizationConfigMixin):
    """The attention scheme and the depth sharing of a stock model; the `quantization_config` of its config.

    `share` makes it. All names are relative to the base model, with ``*`` for the number of a layer.

    Args:
        attention_scheme: a key of `schemes.SCHEMES`.
        depth_sharing, num_atoms, num_groups, rank, coefficient_source, coefficient_init: see `SharedAttentionConfig`.
        layer_ranks: the rank of a target in each layer, where `rank` is not the same for all.
        targets: the matrices that `depth_sharing` applies to.
        attention: of each attention stack, its matrices by role (see `find_attention`) and its number of heads.
        format: version of the record.
        quant_method: by which transformers finds this class.
        to_load: what to do, for a reader of config.json.
    """

    attention_scheme: str = "standard"
    depth_sharing: str = "none"
    num_atoms: int | None = None
    num_groups: int | None = None
    rank: int | None = None
    layer_ranks: dict[str, list[int]] | None = None
    coefficient_source: str = "direct"
    coefficient_init: str = "depth"
    targets: list[str] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT
    quant_method: str = METHOD
    to_load: str = "pip install shared_bert, and import shared_bert before from_pretrained"

    def __post_init__(self):
        for name, valid in (
            ("attention_scheme", SCHEMES),
            ("depth_sharing", DEPTH_SHARING),
            ("coefficient_source", ("direct", "network")),
            ("coefficient_init", ("depth", "normal")),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(valid)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Return the record that a config.json holds.

        Raises:
            ValueError: a newer version of this package has written it, or it is damaged.
        """
        unknown = config_dict.keys() - {f.name for f in fields(cls)}
        if unknown or config_dict.get("format", FORMAT) != FORMAT:
            raise ValueError(
                f"quantization_config has format {config_dict.get('format')} and the unknown fields "
                f"{sorted(unknown) or 'none'}: a newer version of shared_bert has written it; upgrade the package"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def scheme(self) -> Scheme:
        return SCHEMES[self.attention_scheme]

    @property
    def sharing_names(self) -> list[str]:
        """The attention scheme, and the depth sharing if there is one."""
        return [name for name in (self.attention_scheme, self.depth_sharing) if name != "none"]

    def ranks(self, target: str, num_layers: int) -> list[int]:
        """Return the rank that a target's factors have in each layer; 0 for none."""
        if self.layer_ranks is not None:
            return self.layer_ranks[target]
        return [self.rank or 0] * num_layers


def sharing_record(config: PreTrainedConfig) -> SharingConfig | None:
    """Return what a stock model shares by its config, or None."""
    record = getattr(config, "quantization_config", None)
    if isinstance(record, dict) and record.get("quant_method") == METHOD:
        return SharingConfig.from_dict(record)
    return record if isinstance(record, SharingConfig) else None
