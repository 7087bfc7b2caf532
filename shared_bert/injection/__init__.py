"""Sharing in any stock model of transformers."""

from .report import SharingReport
from .share import share
from .sharing_config import SharingConfig
from .targets import ATTENTION_NAMES, AttentionNames

__all__ = ["ATTENTION_NAMES", "AttentionNames", "SharingConfig", "SharingReport", "share"]
