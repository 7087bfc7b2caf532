"""The options of pre-training, conversion and fine-tuning: each is a YAML key and a command-line option."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from ..modeling import SCHEMES
from ..modeling.configuration_shared_attention import DEPTH_SHARING
from .yaml_files import load_yaml


def option(default: Any, text: str, **options):
    """Return a dataclass field that is an option of a command, with its help."""
    return field(default=default, metadata={"help": text, **options})


@dataclass
class ConfigArguments:
    """The model.

    Raises:
        ValueError: two models or none; invalid overrides.
    """

    model_name_or_path: str | None = option(None, "A trained model to continue training; else see config_name.")
    model_type: str | None = option(
        None, "shared_bert, shared_gpt or a language model of transformers, where config_name does not say."
    )
    config_name: str | None = option(None, "A YAML or JSON file of config fields, for a new model.")
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config fields that replace others: a mapping in YAML, else a=1,b=x."}
    )

    def __post_init__(self):
        if isinstance(self.config_overrides, str):
            self.config_overrides = read_overrides(self.config_overrides)
        if self.model_name_or_path and (self.model_type or self.config_name):
            raise ValueError(
                f"model_name_or_path={self.model_name_or_path!r} names a trained model: omit "
                "model_type and config_name, which make a new one"
            )
        if not (self.model_name_or_path or self.model_type or self.config_name):
            raise ValueError("no model is named: give model_name_or_path, config_name or model_type")


@dataclass
class ModelArguments(ConfigArguments):
    """The model and its tokenizer.

    Raises:
        ValueError: see `ConfigArguments`; two tokenizers or none; `sharing` of a trained model.
    """

    sharing: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "For a new model of transformers: options of `share`, a mapping in YAML, else a=1,b=x."},
    )
    attn_implementation: str | None = option(None, "eager, sdpa, flex_attention, flash_attention_2 …; else the best.")
    tokenizer_name: str | None = option(None, "A tokenizer on the Hub or a folder; else the model's own.")
    tokenizer_vocab_size: int | None = option(None, "Train a tokenizer of this size on the training text.")
    tokenizer_lowercase: bool = option(True, "Whether a WordPiece tokenizer trained here is uncased.")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.sharing, str):
            self.sharing = read_overrides(self.sharing)
        if self.sharing and self.model_name_or_path:
            raise ValueError("sharing is for a new model: a trained one is converted by convert.py")
        if self.tokenizer_name and self.tokenizer_vocab_size:
            raise ValueError(
                f"tokenizer_name={self.tokenizer_name!r} takes a tokenizer and tokenizer_vocab_size="
                f"{self.tokenizer_vocab_size} trains one: give one of the two"
            )
        if self.tokenizer_vocab_size and self.model_name_or_path:
            raise ValueError("tokenizer_vocab_size is for a new model: a trained one has its own tokenizer")
        if not (self.tokenizer_name or self.tokenizer_vocab_size or self.model_name_or_path):
            raise ValueError("no tokenizer is named: give tokenizer_name, or tokenizer_vocab_size to train one")


def read_overrides(text: str) -> dict[str, Any]:
    """Read "a=1,b=x,c=[1,2]" as YAML would read the values.

    Raises:
        ValueError: it is not of this form.
    """
    name = re.compile(r"(^|,)\s*(\w+)\s*=")
    try:
        found = load_yaml("{" + name.sub(r"\1 \2: ", text) + "}")
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not of the form a=1,b=x") from error
    if lacking := [key for key in found if key not in {match[2] for match in name.finditer(text)}]:
        raise ValueError(f"{text!r}: {lacking[0]!r} has no value; write it as a=1,b=x")
    return found


@dataclass
class DataArguments:
    """The text, and how it is packed into blocks of tokens; see `shared_bert.data`.

    Raises:
        ValueError: mlm_probability is not above 0 and at most 1.
    """

    dataset_name: str | None = option(None, "A data set of the Hub, or the built-in python-docs.")
    dataset_config_name: str | None = option(None, "The data set's configuration.")
    train_file: str | None = option(None, "A local .txt, .jsonl, .json or .parquet file, a folder or a glob.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    text_column: str = option("text", "The column that holds the text.")
    sample_by: str = option(
        "document", "The documents of a text file: its lines, its paragraphs or the whole (document)."
    )
    streaming: bool = option(False, "Read the text while training. Needs max_steps.")
    validation_split: float = option(
        0.02, "Share of the training text to evaluate on, if there is no validation split."
    )
    max_train_samples: int | None = option(None, "Train on no more documents than this.")
    max_eval_samples: int | None = option(None, "Evaluate on no more documents than this.")
    preprocessing_num_workers: int | None = option(None, "Processes that tokenize.")
    block_size: int = option(512, "Tokens per row.")
    separate_documents: bool = option(True, "Keep the documents that share a row from seeing one another.")
    mlm_probability: float = option(0.15, "Share of the tokens that a masked model predicts.")
    whole_word_mask: bool = option(False, "Mask all pieces of a word together.")

    def __post_init__(self):
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability={self.mlm_probability} must be above 0 and at most 1")


@dataclass
class SharingArguments:
    """What a model shares; see `SharedAttentionConfig`."""

    attention_scheme: str = option("standard", "Which matrices make query, key and value.", choices=[*SCHEMES])
    depth_sharing: str = option("none", "How matrices are shared over the depth.", choices=[*DEPTH_SHARING])
    depth_shared_matrices: str = option("qkv", "Which matrices depth_sharing is for.", choices=["qkv", "qkvo"])
    num_atoms: int | None = option(None, "Matrices in each dictionary of masa.")
    num_groups: int | None = option(None, "Groups of layers of sequential and repeat_all_over.")
    rank: int | None = option(None, "Of low_rank; with the others, of what each layer adds to its shared matrices.")


@dataclass
class ConversionArguments(SharingArguments):
    """The conversion of a trained model; see `from_stock`, and `share` for other architectures.

    Raises:
        ValueError: calibration_tokens without calibration.
    """

    targets: str | None = option(
        None, "Matrices that depth_sharing is for, by the ends of their names, separated by commas; else attention's."
    )

    num_key_value_heads: int | None = option(None, "Fewer heads for key and value.")
    dictionary_groups: int = option(1, "Split the dictionary of masa into this many.")
    spread_rank: bool = option(False, "Spread the rank over the matrices that need it.")
    align: bool = option(True, "Rotate and reorder heads before they are shared.")
    calibration: str | None = option(None, "Text to fit to: a file, or the name of a data set.")
    calibration_tokens: int | None = option(None, "How much of it; 65,536 by default.")

    def __post_init__(self):
        if self.calibration_tokens is not None and self.calibration is None:
            raise ValueError(f"calibration_tokens={self.calibration_tokens} needs calibration")


@dataclass
class RunArguments(TrainingArguments):
    """`TrainingArguments` of every run of this package.

    Raises:
        ValueError: no output_dir; resume_from_checkpoint with overwrite_output_dir; a negative seed.
    """

    overwrite_output_dir: bool = option(False, "Replace the run that output_dir holds.")
    # The filter waits for the device at every step, and hides the losses that `SafeTrainer` stops at.
    logging_nan_inf_filter: bool = option(False, "Leave losses out of the log that are NaN or infinite.")
    # The other processes wait this long while the first one tokenizes.
    ddp_timeout: int = option(6 * 3600, "Seconds that processes wait for one another.")

    def __getstate__(self) -> dict[str, Any]:
        """Omit the Hub's token from `training_args.bin`, which Trainer pickles into every checkpoint."""
        return {**self.__dict__, "hub_token": None}

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir is not given: name the folder for checkpoints and the model")
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError(
                "resume_from_checkpoint continues a run and overwrite_output_dir replaces it: give one of the two"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must be 0 or more")
        super().__post_init__()
        self.dataloader_pin_memory &= self.device.type != "cpu"

    @property
    def device(self) -> torch.device:
        device = super().device
        # In one of several processes it is cpu:N, onto which no checkpoint can be loaded.
        return torch.device("cpu") if device.type == "cpu" else device


@dataclass
class PretrainingArguments(RunArguments):
    """`TrainingArguments` with defaults for pre-training and healing.

    Raises:
        ValueError: see `RunArguments`; options that would break the batches.
    """

    learning_rate: float = option(1e-4, "The peak learning rate.")
    weight_decay: float = option(0.01, "Decay of tensors of two or more dimensions.")
    # The collators read columns (index, epoch) that the model does not take.
    remove_unused_columns: bool = option(False, "Drop what the model does not take before collation.")
    # Every parameter of these models has a gradient in every step; searching for others costs time.
    ddp_find_unused_parameters: bool | None = option(False, "Search for parameters without a gradient.")
    # Batches contain plain numbers as well as tensors, which one process cannot split for the others.
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"dispatch_batches": False}, metadata={"help": "Of accelerate: a dict or a JSON file."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=true would drop columns that the collators need: omit it")
        if self.dataloader_persistent_workers:
            raise ValueError(
                "dataloader_persistent_workers=true would mask every epoch like the first, since such workers are "
                "not told the epoch: omit it"
            )
        super().__post_init__()


@dataclass
class FinetuningArguments(RunArguments):
    """`TrainingArguments` with defaults for fine-tuning."""

    learning_rate: float = option(2e-5, "The peak learning rate.")
    head_learning_rate: float | None = option(None, "Of parameters outside the base model; else learning_rate.")
    weight_decay: float = option(0.01, "Decay of tensors of two or more dimensions.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or below 1 their share of all steps.")
    per_device_train_batch_size: int = option(32, "Rows per device and step.")
    per_device_eval_batch_size: int = option(64, "Rows per device in evaluation.")
    # Rows of similar lengths need little padding.
    train_sampling_strategy: str = option("group_by_length", "random, group_by_length or sequential.")
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = option("no", "When to save checkpoints: no, steps or epoch.")
    logging_strategy: str = option("epoch", "When to log: no, steps or epoch.")
