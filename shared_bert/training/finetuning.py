"""Fine-tuning on a task with labels."""

from collections.abc import Collection
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.utils import logging

from ..data.tasks import Task, tokenize_task
from .arguments import FinetuningArguments
from .metrics import task_metrics
from .models import check_length, check_vocabulary
from .run import run_training, starting_checkpoint
from .trainer import SafeTrainer

# By the kind of a task.
HEADS = {
    "text": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "choice": AutoModelForMultipleChoice,
}
_COLLATORS = {
    "text": DataCollatorWithPadding,
    "tokens": DataCollatorForTokenClassification,
    "choice": DataCollatorForMultipleChoice,
}


class FinetuningTrainer(SafeTrainer):
    """`SafeTrainer` with an optional learning rate for the head: all parameters outside the base model."""

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if (rate := self.args.head_learning_rate) is None:
            return optimizer
        model = self.accelerator.unwrap_model(self.model)
        base = {id(parameter) for parameter in model.base_model.parameters()}
        for group in list(optimizer.param_groups):
            head = [parameter for parameter in group["params"] if id(parameter) not in base]
            if head:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) in base]
                optimizer.add_param_group({**group, "params": head, "lr": rate})
        return optimizer


def read_model_config(name_or_path: str) -> PreTrainedConfig:
    """Return the config of a folder or of a name on the Hub.

    Raises:
        ValueError: there is none, or it is invalid.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model could be loaded from {name_or_path!r}: give a folder with a config.json, or a name on the Hub "
            f"that can be reached ({error})"
        ) from error


def check_model(
    auto_class: type,
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    config_overrides: Collection[str] | None = None,
):
    """Raise a ValueError for a model that `load_for_task` cannot load, as far as its config tells."""
    config = read_model_config(name_or_path)
    if type(config) not in auto_class._model_mapping:
        head = auto_class.__name__.removeprefix("AutoModel")
        raise ValueError(f"{name_or_path} is a {config.model_type}, which has no head {head}")
    for name in config_overrides or ():
        if name not in config.__dataclass_fields__:
            raise ValueError(f"config_overrides: a {config.model_type} has no field {name!r}")
    check_vocabulary(config, tokenizer)


def load_for_task(
    auto_class: type,
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    config_overrides: dict[str, Any] | None = None,
    **fields,
) -> PreTrainedModel:
    """Load a model of this package or of transformers with the head of an Auto class; a new one if it has another.

    Args:
        name_or_path: a folder, or a name on the Hub.
        config_overrides: config fields, such as dropouts.
        **fields: more config fields.

    Raises:
        ValueError: no model, an architecture without such a head, an unknown config field, damaged weights, or a
            tokenizer with more tokens than the model.
        OSError: the model has no weights in safetensors.
    """
    check_model(auto_class, name_or_path, tokenizer, config_overrides)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a report of the weights of the old head, for every run
    try:
        return auto_class.from_pretrained(
            name_or_path,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # the head of another task is replaced
            dtype="float32",
            pad_token_id=tokenizer.pad_token_id,
            **fields,
            **(config_overrides or {}),
        )
    except SafetensorError as error:
        raise ValueError(f"{name_or_path} cannot be loaded, its weights are damaged: {error}") from error
    finally:
        logging.set_verbosity(verbosity)


def check_max_length(name_or_path: str, max_length: int):
    """Raise a ValueError if rows of `max_length` tokens are too long for a model, or too short for a text."""
    if max_length < 8:
        raise ValueError(f"max_length={max_length} leaves no room for text: give 8 or more")
    check_length(read_model_config(name_or_path), "max_length", max_length)


def label_fields(task: Task) -> dict[str, Any]:
    """Return the config fields of a head for the labels of a task."""
    if task.kind == "choice":  # its head scores each choice
        return {}
    names = task.labels or ("score",)
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification" if task.labels else "regression",
    }


def finetune(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: dict[str, Dataset],
    training_args: FinetuningArguments,
    max_length: int = 128,
    padding: bool | str = False,
    config_overrides: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune a model on a task, and save it with its tokenizer into `output_dir`.

    Args:
        name_or_path: see `load_for_task`.
        splits: rows with the task's columns: "train", and the splits of `task.validation`.
        max_length, padding: see `tokenize_task`.
        data: names of the data, for `run.json`.

    Returns:
        `metrics` of training and of the last evaluation, and `epochs`, the metrics of each evaluation in turn.

    Raises:
        ValueError, OSError: see `load_for_task`, `check_max_length` and `starting_checkpoint`.
        FloatingPointError: training diverged.
    """
    check_max_length(name_or_path, max_length)
    checkpoint = starting_checkpoint(training_args)
    metrics = task_metrics(task)
    with training_args.main_process_first(local=False, desc="tokenizing"):
        tokens = {split: tokenize_task(rows, task, tokenizer, max_length, padding) for split, rows in splits.items()}
    set_seed(training_args.seed)
    model = load_for_task(HEADS[task.kind], name_or_path, tokenizer, config_overrides, **label_fields(task))
    trainer = FinetuningTrainer(
        model=model,
        args=training_args,
        data_collator=_COLLATORS[task.kind](tokenizer),
        processing_class=tokenizer,
        train_dataset=tokens["train"],
        eval_dataset=_evaluation_sets(tokens, task.validation),
        compute_metrics=metrics,
    )
    trainer.remove_callback(PrinterCallback)  # many short runs: their results are printed, not every log
    final = run_training(trainer, checkpoint, "fine-tuning", {"dataset_name": None, **(data or {})}, loss_name="loss")
    return {"metrics": final, "epochs": evaluations(trainer.state.log_history)}


def _evaluation_sets(tokens: dict[str, Dataset], splits: Collection[str]) -> Dataset | dict[str, Dataset]:
    """Return the evaluation set, or several by the ends of their names: "matched", "mismatched"."""
    if len(splits) == 1:
        return tokens[next(iter(splits))]
    return {split.removeprefix("validation_"): tokens[split] for split in splits}


def evaluations(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the metrics of each evaluation in training, without the one after it, which is at the same step."""
    by_step = {}
    for log in log_history:
        found = {name: value for name, value in log.items() if name.startswith("eval_")}
        if found:
            of_step = by_step.setdefault(log["step"], {"step": log["step"], "epoch": log["epoch"]})
            by_step[log["step"]] = {**found, **of_step}
    return list(by_step.values())
