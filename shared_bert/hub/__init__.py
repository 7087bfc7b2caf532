"""Pushing models to the Hub with code, tokenizer and card."""

from .cards import model_card
from .checkpoint_pushes import CheckpointPushes
from .uploads import PushError, push_to_hub, stage_checkpoint, upload, write_card

__all__ = ["CheckpointPushes", "PushError", "model_card", "push_to_hub", "stage_checkpoint", "upload", "write_card"]
