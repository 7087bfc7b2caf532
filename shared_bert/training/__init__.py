"""Pre-training, fine-tuning, conversion and healing on `transformers.Trainer`."""

try:
    from .arguments import (
        ConversionArguments,
        DataArguments,
        FinetuningArguments,
        ModelArguments,
        PretrainingArguments,
    )
    from .checkpoints import last_checkpoint
    from .converting import convert, convert_and_heal
    from .finetuning import FinetuningTrainer, finetune
    from .healing import heal
    from .pretraining import pretrain
    from .recipe import parse_recipe
    from .throughput import peak_flops, training_flops_per_token
    from .trainer import PretrainingTrainer, SafeTrainer
except ModuleNotFoundError as error:
    raise ImportError(f"shared_bert.training needs {error.name}: pip install 'shared_bert[train]'") from error

__all__ = [
    "ConversionArguments",
    "DataArguments",
    "FinetuningArguments",
    "FinetuningTrainer",
    "ModelArguments",
    "PretrainingArguments",
    "PretrainingTrainer",
    "SafeTrainer",
    "convert",
    "convert_and_heal",
    "finetune",
    "heal",
    "last_checkpoint",
    "parse_recipe",
    "peak_flops",
    "pretrain",
    "training_flops_per_token",
]
