"""GLUE: a model fine-tuned on every task with several seeds, one record for each run, and their table."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ..data import load_tokenizer
from ..data.tasks import GLUE, glue_task, load_glue
from ..training.arguments import FinetuningArguments, read_overrides
from ..training.finetuning import finetune
from .efficiency import environment

_SETTINGS = (
    "learning_rate", "head_learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy", "bf16",
)  # fmt: skip


@dataclass
class GlueArguments:
    """What is fine-tuned, and on which tasks.

    Raises:
        ValueError: an unknown task, a seed that is not a number, an unknown choice of epoch.
    """

    model: str = field(metadata={"help": "A folder, or a name on the Hub: of this package or of transformers."})
    kind: str = field(default="glue", metadata={"help": "Of the recipe.", "choices": ["glue"]})
    tasks: str = field(default=",".join(GLUE), metadata={"help": "Tasks, separated by commas."})
    seeds: str = field(default="0", metadata={"help": "Seeds, separated by commas."})
    data_dir: str | None = field(default=None, metadata={"help": "A folder per task; else the Hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Else the model's own."})
    max_length: int = field(default=128, metadata={"help": "Tokens per row at most."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad all rows alike, not each batch."})
    epoch: str = field(
        default="last", metadata={"help": "Which epoch counts: last or best.", "choices": ["last", "best"]}
    )
    config_overrides: str | None = field(default=None, metadata={"help": "Config fields, such as dropouts: a=1,b=x."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on no more rows than this."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on no more rows than this."})

    def __post_init__(self):
        self.task_names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        for name in self.task_names:
            glue_task(name)
        self.seed_numbers = parse_seeds(self.seeds)


def parse_seeds(text: str) -> list[int]:
    """Return the numbers of "0,1,2".

    Raises:
        ValueError: something else.
    """
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError as error:
        raise ValueError(f"seeds={text!r} must be numbers, separated by commas") from error


def run_glue(arguments: GlueArguments, training_args: FinetuningArguments) -> list[dict[str, Any]]:
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
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model)
    settings = run_settings(arguments, training_args)
    check_settings(output, settings)
    splits = {name: _limited(load_glue(name, arguments.data_dir), arguments) for name in arguments.task_names}
    runs = [(name, seed) for name in arguments.task_names for seed in arguments.seed_numbers]
    failed = {}
    with tqdm(runs, desc="runs", unit="run") as progress:
        for name, seed in progress:
            progress.set_postfix_str(f"{name}, seed {seed}")
            path = _record_path(output, name, seed)
            if path.exists() or name in failed:
                continue
            try:
                record = _run(name, seed, arguments, training_args, tokenizer, splits[name])
            except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
                failed[name] = error
                progress.write(f"{name} failed: {error}")
                continue
            if training_args.process_index == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({**record, "settings": settings}, indent=2) + "\n")
                metrics = ", ".join(f"{metric} {value:.4f}" for metric, value in record["metrics"].items())
                progress.write(f"{name}, seed {seed}: {metrics}")
    records = load_records(output)
    if training_args.process_index == 0:
        (output / "glue.md").write_text(glue_table({arguments.model: records}))
        draw_glue({arguments.model: records}, output / "glue.png")
    if failed:
        raise ValueError("; ".join(f"{name} failed: {error}" for name, error in failed.items()))
    return records


def _run(
    name, seed, arguments: GlueArguments, training_args: FinetuningArguments, tokenizer, splits
) -> dict[str, Any]:
    folder = Path(training_args.output_dir, name, f"seed-{seed}")
    args = replace(training_args, output_dir=str(folder), seed=seed, overwrite_output_dir=True)
    task = GLUE[name]
    result = finetune(
        arguments.model,
        tokenizer,
        task,
        splits,
        args,
        max_length=arguments.max_length,
        padding="max_length" if arguments.pad_to_max_length else False,
        config_overrides=read_overrides(arguments.config_overrides or ""),
        data={"dataset_name": "nyu-mll/glue", "dataset_config_name": name},
    )
    key = f"eval_{metric_names(name)[0]}"
    best = max(result["epochs"], key=lambda epoch: epoch[key])
    chosen = best if arguments.epoch == "best" else result["epochs"][-1]
    return {
        "model": arguments.model,
        "task": name,
        "seed": seed,
        "epoch": arguments.epoch,
        "score": chosen[key],
        "metrics": {metric: chosen[f"eval_{metric}"] for metric in metric_names(name)},
        "best": best,
        "epochs": result["epochs"],
        "train_seconds": result["metrics"]["train_runtime"],
        "rows": {split: len(rows) for split, rows in splits.items()},
        **environment(args.device.type),
    }


def metric_names(name: str) -> list[str]:
    """Return the names of a task's metrics; the first is its score. MNLI has each on "matched" and "mismatched"."""
    task = GLUE[name]
    if len(task.validation) == 1:
        return list(task.metrics)
    parts = [split.removeprefix("validation_") for split in task.validation]
    return [f"{part}_{metric}" for part in parts for metric in task.metrics]


def _limited(splits: dict, arguments: GlueArguments) -> dict:
    def limit(split: str) -> int | None:
        return arguments.max_train_samples if split == "train" else arguments.max_eval_samples

    return {
        split: rows if limit(split) is None else rows.select(range(min(limit(split), len(rows))))
        for split, rows in splits.items()
    }


def run_settings(arguments, training_args: FinetuningArguments) -> dict[str, Any]:
    """Return the settings that all records of an output folder have in common."""
    of_runs = {name: value for name, value in asdict(arguments).items() if name not in ("tasks", "seeds")}
    return {**of_runs, **{name: getattr(training_args, name) for name in _SETTINGS}}


def check_settings(output: Path, settings: dict[str, Any]):
    """Raise a ValueError if the output folder has records of other settings."""
    for record in load_records(output):
        for name, value in settings.items():
            if (kept := record["settings"].get(name)) != json.loads(json.dumps(value)):
                raise ValueError(f"{output} has results with {name}={kept!r}, not {value!r}: name another output_dir")


def _record_path(output: Path, name: str, seed: int) -> Path:
    return output / "records" / f"{name}-{seed}.json"


def load_records(output: str | Path) -> list[dict[str, Any]]:
    """Return the records of an output folder, by task and seed.

    Raises:
        ValueError: a damaged record.
    """
    records = []
    for path in sorted(Path(output, "records").glob("*.json")):
        try:
            records.append(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: delete it ({error})") from error
    order = [*GLUE, "squad"]
    return sorted(records, key=lambda record: (order.index(record["task"]), record["seed"]))


def scores(records: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the scores of every task, one for each seed, in percent."""
    found = {}
    for record in records:
        found.setdefault(record["task"], []).append(100 * record["score"])
    return found


def glue_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of mean ± standard deviation over the seeds, in percent; a row for each model.

    Args:
        records: of each model, by its name.
    """
    of_models = {model: scores(found) for model, found in records.items()}
    tasks = [name for name in GLUE if any(name in found for found in of_models.values())]
    header = ["model", *(f"{name} ({GLUE[name].metrics[0].split('_')[0]})" for name in tasks), "mean"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for model, found in of_models.items():
        cells = [format_scores(found[name]) if name in found else "" for name in tasks]
        mean = statistics.mean(statistics.mean(found[name]) for name in tasks) if all(cells) else None
        lines.append(f"| {model} | {' | '.join(cells)} | {'' if mean is None else f'{mean:.2f}'} |")
    return "\n".join(lines) + "\n"


def format_scores(values: list[float]) -> str:
    """Return "mean ± standard deviation", or the score of a single seed."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def draw_glue(records: dict[str, list[dict[str, Any]]], path: Path):
    """Draw each model's mean score by task, with the standard deviation over the seeds."""
    of_models = {model: scores(found) for model, found in records.items()}
    tasks = [name for name in GLUE if any(name in found for found in of_models.values())]
    figure = Figure(figsize=(max(5, 1.2 * len(tasks) + 2), 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(ylabel="score (%)")
    width = 0.8 / len(of_models)
    for i, (model, found) in enumerate(of_models.items()):
        places = [tasks.index(name) + (i - (len(of_models) - 1) / 2) * width for name in found]
        means = [statistics.mean(values) for values in found.values()]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in found.values()]
        hatch = ["", "//", "..", "xx", "\\\\", "++"][i % 6]
        axes.bar(places, means, width, yerr=spread, capsize=3, label=model, hatch=hatch, edgecolor="white")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path)
