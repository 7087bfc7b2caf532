"""Tasks with labels: a model fine-tuned on each with several seeds, on GLUE or on data of one's own."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data import first_rows, load_tokenizer
from ..data.tasks import GLUE, GLUE_ON_THE_HUB, Task, glue_task, load_file, load_from_hub, load_glue, task_of_rows
from ..training.arguments import FinetuningArguments, option, read_overrides
from ..training.finetuning import HEADS, check_max_length, check_model, finetune
from ..training.metrics import check_metrics, task_metrics
from .efficiency import environment
from .records import (
    SeededArguments,
    check_settings,
    load_records,
    record_path,
    run_settings,
    save_record,
    write_scores,
)


@dataclass(kw_only=True)
class ClassificationArguments(SeededArguments):
    """What is fine-tuned.

    Raises:
        ValueError: see `SeededArguments`.
    """

    model: str = field(metadata={"help": "A folder, or a name on the Hub: of this package or of transformers."})
    tokenizer_name: str | None = option(None, "Else the model's own.")
    max_length: int = option(128, "Tokens per row at most.")
    pad_to_max_length: bool = option(False, "Pad all rows to one length, not each batch to its own.")
    epoch: str = option(
        "last", "Which epoch counts: last, or the best on the validation data.", choices=["last", "best"]
    )


@dataclass(kw_only=True)
class GlueArguments(ClassificationArguments):
    """Fine-tuning on GLUE.

    Raises:
        ValueError: see `ClassificationArguments`; an unknown task.
    """

    kind: str = option("glue", "Of the recipe.", choices=["glue"])
    tasks: str = option(",".join(GLUE), "Tasks, separated by commas.")
    data_dir: str | None = option(None, "A folder per task; else the Hub.")

    def __post_init__(self):
        super().__post_init__()
        self.task_names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        if not self.task_names:
            raise ValueError(f"tasks={self.tasks!r} names no task")
        for name in self.task_names:
            glue_task(name)

    def load(self) -> dict[str, tuple[Task, dict[str, Dataset]]]:
        """Return each task with its splits."""
        return {name: (GLUE[name], load_glue(name, self.data_dir)) for name in self.task_names}

    def data_of(self, name: str) -> dict[str, str | None]:
        """Return the names of a task's data, for `run.json`."""
        return {"dataset_name": GLUE_ON_THE_HUB, "dataset_config_name": name}


@dataclass(kw_only=True)
class TaskArguments(ClassificationArguments):
    """Fine-tuning on data of one's own, in files or on the Hub; kinds of tasks are described in `Task`.

    Raises:
        ValueError: see `ClassificationArguments`; no data, columns that the kind does not take, or an unknown metric.
    """

    kind: str = option(
        "text",
        "A label per text or pair, a label per word, or the right choice.",
        choices=["text", "tokens", "choice"],
    )
    train_file: str | None = option(None, "A .parquet, .jsonl or .json file.")
    validation_file: str | None = option(None, "The same, to evaluate on.")
    dataset_name: str | None = option(None, "Instead of files: a data set of the Hub.")
    dataset_config_name: str | None = option(None, "The data set's configuration.")
    validation_split: str = option("validation", "The data set's split to evaluate on.")
    text_columns: str | None = option(
        None,
        "text: the column of the text, or the two of a pair, separated by a comma. tokens: the column of the lists of "
        "words. choice: the column of the text before the choices, or two, the second of which begins each choice. "
        "The default is text, for tokens it is tokens.",
    )
    choice_columns: str | None = option(None, "choice: the columns of the choices, or the one of their lists.")
    label_column: str = option("label", "The column of the labels: numbers from 0, or names.")
    regression: bool = option(False, "Labels are numbers to predict, not classes.")
    metrics: str | None = option(
        None, "Separated by commas; else accuracy, for regression pearson,spearmanr, for spans of words their F1."
    )

    def __post_init__(self):
        super().__post_init__()
        files = self.train_file, self.validation_file
        if any(files) if self.dataset_name else not all(files):
            raise ValueError("give either train_file and validation_file, or dataset_name")
        self.texts = _names(self.text_columns) or (("tokens",) if self.kind == "tokens" else ("text",))
        self.choices = _names(self.choice_columns)
        most = 1 if self.kind == "tokens" else 2
        if len(self.texts) > most:
            raise ValueError(f"text_columns={self.text_columns!r}: {self.kind} takes {most} at most")
        if bool(self.choices) != (self.kind == "choice"):
            raise ValueError(f"choice_columns={self.choice_columns!r} is for kind=choice, which needs it")
        if self.regression and self.kind != "text":
            raise ValueError(f"regression=true is for kind=text, not {self.kind}")
        self.metric_names = _names(self.metrics)
        check_metrics(self.metric_names)

    def load(self) -> dict[str, tuple[Task, dict[str, Dataset]]]:
        """Return the task with its splits, under the name of the training file or the data set."""
        if self.dataset_name:
            splits = load_from_hub(self.dataset_name, self.dataset_config_name)
            for split in ("train", self.validation_split):
                if split not in splits:
                    raise ValueError(f"{self.dataset_name} has no split {split!r}, only {', '.join(splits)}")
            rows = {"train": splits["train"], "validation": splits[self.validation_split]}
        else:
            rows = {"train": load_file(self.train_file), "validation": load_file(self.validation_file)}
        task = task_of_rows(
            rows, self.texts, self.label_column, self.regression, self.metric_names, self.kind, self.choices
        )
        return {Path(self.dataset_name or self.train_file).stem: task}

    def data_of(self, name: str) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in ("dataset_name", "dataset_config_name", "train_file")}


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def run_classification(
    arguments: GlueArguments | TaskArguments, training_args: FinetuningArguments
) -> list[dict[str, Any]]:
    """Fine-tune on all tasks with all seeds, and write records, a table and a plot into `output_dir`.

    Runs whose record is there already are skipped, so an interrupted command continues. A task that fails does not
    stop the others.

    Returns:
        The records of all runs.

    Raises:
        ValueError: invalid arguments or data, or results of other settings in `output_dir`, before any training; after
            it, if tasks failed.
    """
    output = Path(training_args.output_dir)
    check_max_length(arguments.model, arguments.max_length)
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model)
    settings = run_settings(arguments, training_args)
    check_settings(output, settings)
    if arguments.epoch == "best" and training_args.eval_strategy == "no":
        raise ValueError("epoch=best needs an evaluation of each epoch: omit eval_strategy=no")
    tasks = arguments.load()
    overrides = read_overrides(arguments.config_overrides or "")
    for task, _ in tasks.values():
        task_metrics(task)
        check_model(HEADS[task.kind], arguments.model, tokenizer, overrides)
    is_main = training_args.process_index == 0
    failed = {}
    with tqdm(
        [(name, seed) for name in tasks for seed in arguments.seed_numbers], desc="runs", unit="run"
    ) as progress:
        for name, seed in progress:
            progress.set_postfix_str(f"{name}, seed {seed}")
            path = record_path(output, name, seed)
            if path.exists() or name in failed:
                continue
            try:
                record = _run(name, seed, *tasks[name], arguments, training_args, tokenizer)
            except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
                failed[name] = error
                progress.write(f"{name} failed: {error}")
                continue
            if is_main:
                save_record(path, {**record, "settings": settings})
                metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
                progress.write(f"{name}, seed {seed}: {metrics}")
    records = load_records(output)
    if is_main and records:
        write_scores({arguments.model: records}, output / "results")
    if failed:
        raise ValueError("; ".join(f"{name} failed: {error}" for name, error in failed.items()))
    return records


def _run(
    name: str,
    seed: int,
    task: Task,
    splits: dict[str, Dataset],
    arguments: GlueArguments | TaskArguments,
    training_args: FinetuningArguments,
    tokenizer,
) -> dict[str, Any]:
    folder = Path(training_args.output_dir, name, f"seed-{seed}")
    names = metric_names(task)
    args = replace(training_args, output_dir=str(folder), seed=seed, overwrite_output_dir=True)
    if arguments.epoch == "best":
        args = replace(
            args,
            load_best_model_at_end=True,
            metric_for_best_model=names[0],
            save_strategy=args.eval_strategy,
            save_total_limit=1,
            save_only_model=True,
        )
    splits = {split: _limited(split, rows, arguments) for split, rows in splits.items()}
    result = finetune(
        arguments.model,
        tokenizer,
        task,
        splits,
        args,
        max_length=arguments.max_length,
        padding="max_length" if arguments.pad_to_max_length else False,
        config_overrides=read_overrides(arguments.config_overrides or ""),
        data=arguments.data_of(name),
    )
    best = max(result["epochs"], key=lambda epoch: epoch[f"eval_{names[0]}"])
    chosen = best if arguments.epoch == "best" else result["epochs"][-1]
    return {
        "model": arguments.model,
        "task": name,
        "seed": seed,
        "epoch": arguments.epoch,
        "metric": names[0],
        "score": chosen[f"eval_{names[0]}"],
        "metrics": {metric: chosen[f"eval_{metric}"] for metric in names},
        "best": best,
        "epochs": result["epochs"],
        "train_seconds": result["metrics"]["train_runtime"],
        "rows": {split: len(rows) for split, rows in splits.items()},
        **environment(args.device.type),
    }


def metric_names(task: Task) -> list[str]:
    """Return the names of a task's metrics; the first is its score. MNLI has each as "matched_" and "mismatched_"."""
    if len(task.validation) == 1:
        return list(task.metrics)
    parts = [split.removeprefix("validation_") for split in task.validation]
    return [f"{part}_{metric}" for part in parts for metric in task.metrics]


def _limited(split: str, rows: Dataset, arguments: ClassificationArguments) -> Dataset:
    most = arguments.max_train_samples if split == "train" else arguments.max_eval_samples
    return first_rows(rows, most)
