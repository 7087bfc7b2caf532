"""Sharing in any stock model of transformers."""

from .share import SharingReport, replaced_parameters, share
from .sharing_config import SharingConfig, sharing_record
from .targets import ATTENTION_NAMES, AttentionNames

__all__ = [
    "ATTENTION_NAMES",
    "AttentionNames",
    "SharingConfig",
    "SharingReport",
    "replaced_parameters",
    "share",
    "sharing_record",
]
