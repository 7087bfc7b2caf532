"""Healing for an experiment, in a folder that is thrown away."""

import tempfile
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..training import DataArguments, PretrainingArguments, heal


def heal_shortly(
    converted: PreTrainedModel,
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> dict[str, float]:
    """Distil a converted model in place, on the original's device, in bfloat16 on a GPU; return what it took."""
    on_gpu = original.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        training_args = PretrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=0.0,
            warmup_steps=0.05,
            lr_scheduler_type="cosine",
            logging_steps=20,
            save_strategy="no",
            disable_tqdm=True,
            bf16=on_gpu,
            use_cpu=not on_gpu,
        )
        data_args = replace(data_args, max_eval_samples=32)
        metrics = heal(converted, original, tokenizer, data_args, training_args)
    return {
        "steps": steps,
        "tokens": steps * batch_size * data_args.block_size,
        "seconds": metrics["train_runtime"],
        "eval_loss": metrics["eval_loss"],
    }
