"""Pre-training, from text to a saved model."""

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase, TrainerCallback, set_seed

from ..conversion.families import FAMILIES
from ..data import (
    Blocks,
    CausalLanguageModelingCollator,
    MaskedLanguageModelingCollator,
    StreamedBlocks,
    check_tokenizer,
    corpus_statistics,
    load_documents,
    load_tokenizer,
    pack,
    train_tokenizer,
)
from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .checkpoints import checkpoint_to_resume, remove_run
from .loss_curve import save_loss_curve
from .metrics import accuracy_of, likeliest_tokens
from .models import config_fields, make_model, restore_use_cache
from .run_record import RunRecorder
from .trainer import PretrainingTrainer, uses_fsdp

_TOKENIZER_KINDS = {"mlm": "wordpiece", "clm": "byte_bpe"}


def pretrain(
    model_args: ModelArguments, data_args: DataArguments, training_args: PretrainingArguments
) -> dict[str, float]:
    """Trains a masked or causal language model, as its type asks, and saves it with its tokenizer.

    `output_dir` gets the model, the tokenizer, the checkpoints, Trainer's metrics and state, `loss_curve.json` and
    `loss_curve.png`, and nothing before training starts. Several processes, on one machine or more, share that folder
    and the cache of data sets.

    Returns:
        The metrics of training and of the final evaluation.

    Raises:
        ValueError: arguments that contradict one another or the files they name; before any training.
        FileNotFoundError: text that is not there.
        FloatingPointError: training diverged; with the step, the learning rate and the last good checkpoint.
        OSError: a disk is full; with the last good checkpoint.
    """
    checkpoint = checkpoint_to_resume(
        training_args.output_dir, training_args.resume_from_checkpoint, training_args.overwrite_output_dir
    )
    check_launch(checkpoint, training_args)
    stated = config_fields(model_args)
    objective = FAMILIES[stated["model_type"]].objective
    _check_arguments(stated, model_args, data_args, training_args)
    tokenizer_path = checkpoint or model_args.tokenizer_name
    if not (tokenizer_path or model_args.tokenizer_vocab_size):
        tokenizer_path = model_args.model_name_or_path
    if tokenizer_path:
        _fit_config(stated, load_tokenizer(tokenizer_path), objective)

    is_main = training_args.process_index == 0
    # The first process reads, and later packs; the others find the results in the cache.
    with training_args.main_process_first(local=False, desc="reading the text"):
        documents = read_documents(data_args, training_args.seed)
    if tokenizer_path:
        tokenizer = load_tokenizer(tokenizer_path)
    else:
        if is_main:
            print(f"training a tokenizer of {model_args.tokenizer_vocab_size} tokens", flush=True)
        tokenizer = is_main and train_tokenizer(
            _TOKENIZER_KINDS[objective],
            documents["train"],
            model_args.tokenizer_vocab_size,
            model_max_length=data_args.block_size,
            lowercase=model_args.tokenizer_lowercase,
        )
        (tokenizer,) = broadcast_object_list([tokenizer])
    with training_args.main_process_first(local=False, desc="packing the text"):
        blocks = {split: pack_split(split, part, tokenizer, data_args) for split, part in documents.items()}

    set_seed(training_args.seed)
    config = _fit_config(stated, tokenizer, objective)
    model = make_model(config, model_args.model_name_or_path, model_args.attn_implementation)
    statistics = None
    if is_main and not data_args.streaming:
        statistics = corpus_statistics(blocks["train"], tokenizer.all_special_ids)
    if is_main:
        print(f"{type(model).__name__} ({config.attention_scheme}): {model.num_parameters():,} parameters")
        if statistics:
            print(
                f"training text: {statistics.num_blocks:,} blocks of {data_args.block_size}, "
                f"{statistics.num_tokens:,} tokens, unigram entropy {statistics.unigram_entropy:.3f} nats",
                flush=True,
            )
        else:
            print("training text: a stream, whose blocks and tokens are not known beforehand", flush=True)

    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        data_collator=_collator(objective, tokenizer, data_args, training_args.seed),
        train_dataset=EndlessBlocks(blocks["train"]) if data_args.streaming else Blocks(blocks["train"]),
        eval_dataset=StreamedBlocks(blocks["validation"]) if data_args.streaming else Blocks(blocks["validation"]),
        processing_class=tokenizer,
        compute_metrics=accuracy_of(objective),
        preprocess_logits_for_metrics=likeliest_tokens,
    )
    if training_args.overwrite_output_dir:
        trainer.add_callback(RunRemover)
    trainer.add_callback(RunRecorder("pre-training", data_args))
    if checkpoint and is_main:
        print(f"resuming from {checkpoint}", flush=True)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    restore_use_cache(model.config)
    evaluation = trainer.finish(metrics)
    if is_main:
        entropy = statistics and statistics.unigram_entropy
        title = f"{type(model).__name__} ({config.attention_scheme})"
        save_loss_curve(training_args.output_dir, trainer.state.log_history, entropy, title)
        print(
            f"evaluation loss {evaluation['eval_loss']:.3f} nats"
            + (f" (unigram entropy of the training text {entropy:.3f})" if entropy else "")
            + f", perplexity {evaluation['eval_perplexity']:.1f}, accuracy {evaluation['eval_accuracy']:.1%}\n"
            f"model, metrics and loss_curve.png are in {training_args.output_dir}"
        )
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return {**metrics, **evaluation}


def check_launch(checkpoint: str | None, training_args: PretrainingArguments):
    """Raises a ValueError where a checkpoint was written under FSDP and is not resumed so, or the reverse."""
    if checkpoint and Path(checkpoint, "optimizer.bin").exists() != uses_fsdp(training_args):
        raise ValueError(
            f"{checkpoint} was written {'without' if uses_fsdp(training_args) else 'under'} FSDP: launch the run as "
            "it was, or start a new one from its weights by model_name_or_path"
        )


def check_streaming(data_args: DataArguments, training_args: PretrainingArguments):
    """Raises a ValueError where a stream could not be trained on."""
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(f"streaming=true has no end: max_steps={training_args.max_steps} must be above 0")
    if data_args.streaming and training_args.dataloader_num_workers > 1:
        raise ValueError(
            f"streaming=true is read by one worker: dataloader_num_workers={training_args.dataloader_num_workers} "
            "must be 0 or 1"
        )


def _check_arguments(
    stated: dict[str, Any], model_args: ModelArguments, data_args: DataArguments, training_args: PretrainingArguments
):
    check_streaming(data_args, training_args)
    if data_args.whole_word_mask and FAMILIES[stated["model_type"]].objective != "mlm":
        raise ValueError(f"whole_word_mask=true is for masked models: a {stated['model_type']} masks nothing")
    config = AutoConfig.for_model(**stated)
    if data_args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size={data_args.block_size} is more than the model's "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    trained_size = model_args.tokenizer_vocab_size
    if trained_size and trained_size > stated.get("vocab_size", math.inf):
        raise ValueError(
            f"tokenizer_vocab_size={trained_size} is more than the model's vocab_size={stated['vocab_size']}"
        )


def _fit_config(stated: dict[str, Any], tokenizer: PreTrainedTokenizerBase, objective: str) -> PreTrainedConfig:
    """Makes the config for a tokenizer: its special tokens and, where none is stated, its size up to a multiple of 64.

    Raises:
        ValueError: a tokenizer that lacks special tokens of `objective`, or has more tokens than the model.
    """
    check_tokenizer(tokenizer, objective)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**{"vocab_size": math.ceil(len(tokenizer) / 64) * 64, **stated, **ids})
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size={config.vocab_size}")
    return config


def read_documents(arguments: DataArguments, seed: int) -> dict[str, Any]:
    """Gives the documents of `load_documents`, by their split."""
    return load_documents(
        dataset_name=arguments.dataset_name,
        dataset_config_name=arguments.dataset_config_name,
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        text_column=arguments.text_column,
        sample_by=arguments.sample_by,
        streaming=arguments.streaming,
        validation_split=arguments.validation_split,
        max_train_samples=arguments.max_train_samples,
        max_eval_samples=arguments.max_eval_samples,
        seed=seed,
    )


def pack_split(split: str, documents, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments):
    """Packs the documents of a split, which errors name."""
    try:
        blocks = pack(
            documents,
            tokenizer,
            arguments.block_size,
            arguments.separate_documents,
            num_proc=arguments.preprocessing_num_workers,
        )
        next(iter(blocks))  # a stream shows only now that it does not fill one block
        return blocks
    except ValueError as error:
        raise ValueError(f"{split} text: {error}") from error


def _collator(objective: str, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int):
    if objective == "clm":
        return CausalLanguageModelingCollator(arguments.separate_documents)
    return MaskedLanguageModelingCollator(
        tokenizer, arguments.mlm_probability, arguments.whole_word_mask, seed, arguments.separate_documents
    )


class RunRemover(TrainerCallback):
    """Deletes the run that `output_dir` holds when all that can be wrong with the new one has been tried."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            remove_run(args.output_dir)


class EndlessBlocks(torch.utils.data.IterableDataset):
    """A stream that begins anew where it ends: one epoch for Trainer, which cannot resume in a later one."""

    def __init__(self, dataset):
        self.blocks = StreamedBlocks(dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            self.blocks.set_epoch(epoch)
            yield from self.blocks
