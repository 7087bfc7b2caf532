"""Pre-training, from text to a saved model."""

import math
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..conversion.families import FAMILIES
from ..data import (
    CausalLanguageModelingCollator,
    CorpusStatistics,
    MaskedLanguageModelingCollator,
    check_tokenizer,
    corpus_statistics,
    load_tokenizer,
    train_tokenizer,
)
from ..injection.sharing_config import sharing_record
from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .metrics import accuracy_of, likeliest_tokens
from .models import check_length, check_vocabulary, config_fields, make_model, new_config, pretraining_objective
from .run import run_training, starting_checkpoint
from .text import block_datasets, check_streaming, describe_text, pack_documents, read_documents
from .trainer import PretrainingTrainer

_TOKENIZER_KINDS = {"mlm": "wordpiece", "clm": "byte_bpe"}


def pretrain(
    model_args: ModelArguments, data_args: DataArguments, training_args: PretrainingArguments
) -> dict[str, float]:
    """Train a masked or causal language model, depending on its type, and save it with its tokenizer.

    `output_dir` gets the model, the tokenizer, the checkpoints, Trainer's metrics and state, `loss_curve.json` and
    `loss_curve.png`; nothing is written before training starts. All processes, on one machine or more, share that
    folder and the cache of data sets.

    Returns:
        The metrics of training and of the final evaluation.

    Raises:
        ValueError: invalid arguments or files; before any training.
        FileNotFoundError: missing text.
        FloatingPointError: training diverged; names the step, the learning rate and the last good checkpoint.
        OSError: a full disk; names the last good checkpoint.
    """
    checkpoint = starting_checkpoint(training_args)
    stated = config_fields(model_args)
    objective = pretraining_objective(stated["model_type"])
    check_pretraining(stated, model_args, data_args, training_args)
    tokenizer = _given_tokenizer(model_args, checkpoint)
    if tokenizer is not None:
        _fit_config(stated, tokenizer, objective)

    # The first process reads and packs; the others find the results in the cache.
    with training_args.main_process_first(local=False, desc="reading the text"):
        documents = read_documents(data_args, training_args.seed)
    if tokenizer is None:
        tokenizer = _train_tokenizer(objective, documents["train"], model_args, data_args, training_args)
    with training_args.main_process_first(local=False, desc="packing the text"):
        blocks = pack_documents(documents, tokenizer, data_args)

    set_seed(training_args.seed)
    config = _fit_config(stated, tokenizer, objective)
    model = make_model(config, model_args.model_name_or_path, model_args.attn_implementation, model_args.sharing)
    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        data_collator=_collator(config.model_type, tokenizer, data_args, training_args.seed),
        processing_class=tokenizer,
        compute_metrics=accuracy_of(objective),
        preprocess_logits_for_metrics=likeliest_tokens,
        **block_datasets(blocks),
    )
    is_main = trainer.is_world_process_zero()
    statistics = None
    if is_main and not data_args.streaming:
        statistics = corpus_statistics(blocks["train"], tokenizer.all_special_ids)
    if is_main:
        _print_model_and_text(model, data_args, statistics)
    entropy = None if statistics is None else statistics.unigram_entropy
    text = describe_text(data_args)
    metrics = run_training(trainer, checkpoint, "pre-training", text, data_args.block_size, entropy)
    if is_main:
        _print_results(metrics, entropy, training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def _given_tokenizer(model_args: ModelArguments, checkpoint: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of the checkpoint, of the arguments or of the model; return None if one is to be trained."""
    path = checkpoint or model_args.tokenizer_name
    if path is None and model_args.tokenizer_vocab_size is None:
        path = model_args.model_name_or_path
    return None if path is None else load_tokenizer(path)


def _train_tokenizer(
    objective: str,
    documents,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: PretrainingArguments,
) -> PreTrainedTokenizerBase:
    """Train a tokenizer in the first process and broadcast it to the others."""
    tokenizer = None
    if training_args.process_index == 0:
        tokenizer = train_tokenizer_for(objective, documents, model_args, data_args.block_size)
    (tokenizer,) = broadcast_object_list([tokenizer])
    return tokenizer


def train_tokenizer_for(
    objective: str, documents, model_args: ModelArguments, block_size: int
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the training text, of the kind that models with this objective use."""
    print(f"training a tokenizer of {model_args.tokenizer_vocab_size} tokens", flush=True)
    return train_tokenizer(
        _TOKENIZER_KINDS[objective],
        documents,
        model_args.tokenizer_vocab_size,
        model_max_length=block_size,
        lowercase=model_args.tokenizer_lowercase,
    )


def _print_model_and_text(model: PreTrainedModel, data_args: DataArguments, statistics: CorpusStatistics | None):
    shares = sharing_record(model.config) or model.config
    scheme = getattr(shares, "attention_scheme", "stock")
    print(f"{type(model).__name__} ({scheme}): {model.num_parameters():,} parameters")
    if statistics is None:
        print("training text: a stream of unknown length", flush=True)
    else:
        print(
            f"training text: {statistics.num_blocks:,} blocks of {data_args.block_size}, "
            f"{statistics.num_tokens:,} tokens, unigram entropy {statistics.unigram_entropy:.3f} nats",
            flush=True,
        )


def _print_results(metrics: dict[str, float], unigram_entropy: float | None, output_dir: str):
    entropy = "" if unigram_entropy is None else f" (unigram entropy of the training text {unigram_entropy:.3f})"
    print(
        f"evaluation loss {metrics['eval_loss']:.3f} nats{entropy}, perplexity {metrics['eval_perplexity']:.1f}, "
        f"accuracy {metrics['eval_accuracy']:.1%}\n"
        f"model, metrics and loss_curve.png are in {output_dir}"
    )


def check_pretraining(
    stated: dict[str, Any], model_args: ModelArguments, data_args: DataArguments, training_args: PretrainingArguments
):
    """Raise the ValueError of `pretrain` for invalid arguments, before any text is read.

    Args:
        stated: see `config_fields`.
    """
    check_streaming(data_args, training_args)
    model_type = stated["model_type"]
    if data_args.whole_word_mask and pretraining_objective(model_type) != "mlm":
        raise ValueError(f"whole_word_mask=true is for masked language models, not for a {model_type}")
    if model_type in FAMILIES and model_args.sharing:
        raise ValueError(f"sharing is for a model of transformers: a {model_type} has config fields for it")
    if model_type not in FAMILIES and data_args.separate_documents:
        raise ValueError(
            f"a {model_type} attends across the documents of a row: give separate_documents=false for a model of "
            "transformers"
        )
    config = new_config(stated)
    check_length(config, "block_size", data_args.block_size)
    if model_args.sharing:
        make_model(config, sharing=model_args.sharing)  # what it cannot share should be known now
    trained_size = model_args.tokenizer_vocab_size
    if trained_size and trained_size > stated.get("vocab_size", math.inf):
        raise ValueError(
            f"tokenizer_vocab_size={trained_size} is more than the model's vocab_size={stated['vocab_size']}"
        )


def padded_vocab_size(num_tokens: int) -> int:
    """Return the rows of an embedding of so many tokens: a multiple of 64, for speed."""
    return math.ceil(num_tokens / 64) * 64


def _fit_config(stated: dict[str, Any], tokenizer: PreTrainedTokenizerBase, objective: str) -> PreTrainedConfig:
    """Return the config for a tokenizer: its special tokens and, unless stated, its size up to a multiple of 64.

    Raises:
        ValueError: a tokenizer without the special tokens of `objective`, or with more tokens than the model.
    """
    check_tokenizer(tokenizer, objective)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(**{"vocab_size": padded_vocab_size(len(tokenizer)), **stated, **ids})
    check_vocabulary(config, tokenizer)
    return config


def _collator(model_type: str, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments, seed: int):
    if pretraining_objective(model_type) == "clm":
        return CausalLanguageModelingCollator(arguments.separate_documents)
    return MaskedLanguageModelingCollator(
        tokenizer,
        arguments.mlm_probability,
        arguments.whole_word_mask,
        seed,
        arguments.separate_documents,
        count_predictions=model_type in FAMILIES,
    )
