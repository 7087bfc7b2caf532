"""Models on the Hub: pushes with code, tokenizer and card."""

from .callback import CodeAndCard
from .cards import model_card
from .uploads import PushError, push_to_hub, stage_checkpoint, upload, write_card

__all__ = ["CodeAndCard", "PushError", "model_card", "push_to_hub", "stage_checkpoint", "upload", "write_card"]
