"""Records of runs, a JSON file for each; settings, tables and plots of fine-tuning runs."""

import json
import statistics
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..plotting import legend, tidy
from ..training.arguments import RunArguments, option
from .tables import markdown_table

_SETTINGS = (
    "learning_rate", "head_learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor",
    "neftune_noise_alpha", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "train_sampling_strategy", "data_seed", "eval_strategy", "bf16", "fp16",
)  # fmt: skip


@dataclass(kw_only=True)
class SeededArguments:
    """Runs of one recipe with several seeds.

    Raises:
        ValueError: a seed that is not a number, or a limit below 1.
    """

    seeds: str = option("0", "Seeds, separated by commas.")
    config_overrides: str | None = option(None, "Config fields that replace others, such as dropouts: a=1,b=x.")
    max_train_samples: int | None = option(None, "Train on no more examples than this.")
    max_eval_samples: int | None = option(None, "Evaluate on no more examples than this.")

    def __post_init__(self):
        try:
            self.seed_numbers = [int(seed) for seed in self.seeds.split(",")]
        except ValueError as error:
            raise ValueError(f"seeds={self.seeds!r} must be numbers, separated by commas") from error
        for name in ("max_train_samples", "max_eval_samples"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise ValueError(f"{name}={most} must be 1 or more")


def run_settings(arguments, training_args: RunArguments) -> dict[str, Any]:
    """Return the settings that all records of an output folder have in common."""
    of_runs = {name: value for name, value in asdict(arguments).items() if name not in ("tasks", "seeds")}
    return {**of_runs, **{name: getattr(training_args, name, None) for name in _SETTINGS}}


def check_settings(output: Path, settings: dict[str, Any]):
    """Raise a ValueError if the output folder has records of other settings."""
    for record in load_records(output):
        for name, value in settings.items():
            if (kept := record["settings"].get(name)) != json.loads(json.dumps(value)):
                raise ValueError(f"{output} has results with {name}={kept!r}, not {value!r}: name another output_dir")


def record_path(output: Path, name: str, seed: int) -> Path:
    return output / "records" / f"{name}-{seed}.json"


def save_record(path: Path, record: dict[str, Any]):
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    # A line for each entry, however long its lists are.
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    unfinished.replace(path)


def load_record(path: Path, needed: Iterable[str]) -> dict[str, Any]:
    """Return a record.

    Raises:
        ValueError: it is damaged, or lacks one of the entries `needed`.
    """
    try:
        record = json.loads(path.read_text())
        lacking = [name for name in needed if name not in record]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: delete it ({error})") from error
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}: it is not a record of this kind, or of an older version")
    return record


def load_records(output: str | Path) -> list[dict[str, Any]]:
    """Return the records of an output folder, by task and seed.

    Raises:
        ValueError: a damaged record.
    """
    records = [load_record(path, ("task", "seed")) for path in Path(output, "records").glob("*.json")]
    return sorted(records, key=lambda record: (record["task"], record["seed"]))


def load_compared(paths: Iterable[str | Path], may_differ: Collection[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Return the records of several models by name, which have the same settings but for the model.

    Args:
        paths: output folders, whose names are the models'; or JSON files of what this function returns.
        may_differ: settings that need not be the same, such as "bf16" for runs on two machines.

    Raises:
        ValueError: no or damaged records, records of different settings, or a name that occurs twice.
    """
    records = {}
    for path in map(Path, paths):
        try:
            found = json.loads(path.read_text()) if path.is_file() else {path.name: load_records(path)}
        except ValueError as error:
            raise ValueError(f"{path} has no records of fine-tuning: {error}") from error
        for name, of_model in found.items():
            if not of_model:
                raise ValueError(f"{path} has no records of fine-tuning")
            if name in records:
                raise ValueError(f"there are two models of the name {name!r}: rename a folder")
            records[name] = of_model
    first = next(iter(records.values()))[0]["settings"]
    for name, of_model in records.items():
        for record in of_model:
            for setting in {**first, **record["settings"]}:
                value = record["settings"].get(setting)
                if setting not in ("model", "tokenizer_name", *may_differ) and value != first.get(setting):
                    raise ValueError(
                        f"{name}: {setting}={value!r}, but {first.get(setting)!r} in the first: scores of different "
                        "settings cannot be compared"
                    )
    return records


def scores_by_task(
    records: dict[str, list[dict[str, Any]]],
) -> tuple[dict[str, str], dict[str, dict[str, list[float]]]]:
    """Return each task's metric, and the scores.

    Args:
        records: of each model, by its name.
    """
    metrics, scores = {}, {}
    for model, found in records.items():
        scores[model] = {}
        for record in found:
            metrics[record["task"]] = record["metric"]
            scores[model].setdefault(record["task"], []).append(100 * record["score"])
    return metrics, scores


def format_scores(values: list[float]) -> str:
    """Return "mean ± standard deviation", or the score of a single seed."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def score_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of mean ± standard deviation over the seeds, in percent; a row for each model."""
    metrics, scores = scores_by_task(records)
    header = ["model", *(f"{task} ({metric})" for task, metric in metrics.items()), "mean"]
    rows = []
    for model, found in scores.items():
        cells = [format_scores(found[task]) if task in found else "" for task in metrics]
        mean = f"{statistics.mean(map(statistics.mean, found.values())):.2f}" if all(cells) else ""
        rows.append([model, *cells, mean])
    return markdown_table(header, rows)


def caption(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return a sentence about the scores: of which epoch, and over which seeds."""
    every = [record for of_model in records.values() for record in of_model]
    seeds = [str(seed) for seed in sorted({record["seed"] for record in every})]
    of_seeds = f"of seed {seeds[0]}"
    if len(seeds) > 1:
        of_seeds = f"mean ± standard deviation over the seeds {', '.join(seeds)}"
    epoch = "best epoch on the validation data" if every[0]["epoch"] == "best" else "last epoch"
    return f"Validation scores in percent after the {epoch}, {of_seeds}.\n"


def difference_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of each model's difference from the first one, in points, with its 95 % interval.

    The interval is Student's for the mean difference over the seeds that both models have.
    """
    metrics, _ = scores_by_task(records)
    scores = {
        name: {(record["task"], record["seed"]): 100 * record["score"] for record in of_model}
        for name, of_model in records.items()
    }
    first, *others = scores
    rows = []
    for name in others:
        cells = []
        for task in metrics:
            both = [run for run in scores[name] if run in scores[first] and run[0] == task]
            cells.append(format_difference([scores[name][run] - scores[first][run] for run in both]))
        rows.append([name, *cells])
    return markdown_table([f"minus {first}", *metrics], rows)


def format_difference(values: list[float]) -> str:
    """Return "mean [low, high]" with Student's 95 % interval of the mean; of one value, only that."""
    if len(values) < 2:
        return f"{values[0]:+.2f}" if values else ""
    low, high = student_interval(values)
    return f"{statistics.mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def student_interval(values: list[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of two or more values."""
    from scipy import stats  # takes a second to import

    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return mean - half, mean + half


def write_scores(records: dict[str, list[dict[str, Any]]], output: Path):
    """Write the tables of one or several models to `output`.md, and their plot to `output`.png."""
    text = f"{caption(records)}\n{score_table(records)}"
    if len(records) > 1:
        text += f"\nDifferences in points, with the 95 % interval over paired seeds:\n\n{difference_table(records)}"
    output.with_suffix(".md").write_text(text)
    draw_scores(records, output.with_suffix(".png"))


def draw_scores(records: dict[str, list[dict[str, Any]]], path: Path):
    """Draw each model's scores by task: a dot per seed, and the mean with the standard deviation.

    Each task has an axis of its own, since models differ less than tasks do.
    """
    metrics, scores = scores_by_task(records)
    figure = Figure(figsize=(max(5, 2.1 * len(metrics)), 4), dpi=150, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for place, (model, found) in enumerate(scores.items()):
            if values := found.get(task):
                spread = statistics.stdev(values) if len(values) > 1 else 0
                color, marker = f"C{place % 10}", "osD^v*PX"[place % 8]
                axes.plot([place] * len(values), values, ".", color=color, alpha=0.4, markersize=5)
                axes.errorbar(place, statistics.mean(values), spread, fmt=marker, color=color, capsize=4, label=model)
        axes.set(title=task, xticks=[], xlim=(-0.7, len(scores) - 0.3))
        tidy(axes, grid="y")
    figure.supylabel("score (%)", fontsize="medium")
    legend(figure)
    figure.savefig(path)
