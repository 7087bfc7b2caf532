"""Size, work, time and memory of several models beside the stock model: a row for each, all in one run.

Tables 3 and 4 and figure 3 of Kowsher et al., arXiv 2412.00359. The models are text classifiers with random weights,
on whose values speed does not depend. They take turns, so that a noisy machine slows all of them alike.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion.families import family_of
from ..data import first_rows
from ..data.tasks import Task, glue_task
from ..modeling import SharedAttentionConfig, fix_coefficients
from ..training.arguments import FinetuningArguments
from ..training.finetuning import check_max_length, finetune, label_fields, load_for_task, read_model_config
from .efficiency import peak_memory, take_turns
from .parameters import cost_of, load_config

# Rows and tokens per row.
FINETUNING = (16, 128)  # at most; the batch of figure 3
LATENCY = (1, 16)
THROUGHPUT = (32, 128)


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of a `ClassifierStep`: the config, and "cpu" or "cuda"."""

    config: PreTrainedConfig
    device: str


class ClassifierStep:
    """A classifier with its optimiser and a batch of full rows; a call runs one step of fine-tuning."""

    def __init__(self, settings: ClassifierSettings):
        self.model = _new_classifier(settings.config).to(settings.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.input_ids = _random_ids(self.model, FINETUNING)

    def __call__(self):
        # The task's loss would take no more memory than this one.
        self.model(input_ids=self.input_ids).logits.sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Inference:
    """A classifier in evaluation and a batch of random tokens; a call computes its logits.

    Args:
        shape: rows, and tokens per row.
    """

    def __init__(self, model: PreTrainedModel, shape: tuple[int, int]):
        self.model = model
        self.input_ids = _random_ids(model, shape)

    @torch.no_grad()
    def __call__(self):
        self.model(input_ids=self.input_ids).logits.cpu()


def read_config(name: str) -> PreTrainedConfig:
    """Return the config of a model: a YAML or JSON file (see `load_config`), a folder, or a name on the Hub.

    Raises:
        ValueError: it does not exist, or is not a config.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        return load_config(name)
    return read_model_config(name)


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the stock config of the same shape; a stock one is its own.

    Raises:
        ValueError: see `family_of`.
    """
    family = family_of(config)
    return config if isinstance(config, family.stock_config) else family.to_stock_config(config)


def measure_efficiency(
    configs: dict[str, PreTrainedConfig],
    tokenizer: PreTrainedTokenizerBase,
    task_name: str,
    splits: dict[str, Dataset],
    rows: int = 1024,
    rounds: int = 3,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure models as classifiers of a GLUE task, and first the stock model of the first one's shape, in turns.

    Args:
        configs: by name.
        tokenizer: of all models.
        splits: of the task; see `finetune`.
        rows: of the training data: the first ones, or all if there are fewer.
        rounds: turns of each model; the results are medians. The latency takes ten times as many.

    Returns:
        The settings, and in `models` a row for each: `model`, its name; the number of `parameters` by group and in
        "total" (see `Cost`); `forward_flops_per_token` in rows of the throughput; `epoch_seconds` of each round and
        their median `seconds_per_epoch`; `time_saved`, the share of the stock model's; `latency_ms` and
        `tokens_per_second` of inference; `peak_memory_bytes` of a step of fine-tuning with full rows.

    Raises:
        ValueError: an unknown task, a first model of no known family, or one that has no such head, reads too few
            tokens per row or has a smaller vocabulary than the tokenizer; all before any measurement.
    """
    task = glue_task(task_name)
    stock = stock_config(next(iter(configs.values())))
    configs = {f"stock {stock.model_type}": stock, **configs}
    # Evaluation is not measured: a batch is enough.
    most = {split: rows if split == "train" else FINETUNING[0] for split in splits}
    splits = {split: first_rows(part, most[split]) for split, part in splits.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder, str(i))) for i, name in enumerate(configs)}
        models = {}
        for name, path in paths.items():
            _new_classifier(configs[name]).save_pretrained(path)
            check_max_length(path, FINETUNING[1])
            model = load_for_task(AutoModelForSequenceClassification, path, tokenizer, **label_fields(task))
            models[name] = model.to(device).eval()
        epochs = _epoch_seconds(paths, tokenizer, task, splits, rounds, device)
    seconds = {name: statistics.median(measured) for name, measured in epochs.items()}
    latency = _inference_seconds(models, LATENCY, 10 * rounds)
    inference = _inference_seconds(models, THROUGHPUT, rounds)
    measured = []
    for name, model in models.items():
        # The head reads one token per row.
        cost = cost_of(model, THROUGHPUT[1], predicted_share=1 / THROUGHPUT[1])
        measured.append(
            {
                "model": name,
                "parameters": {**cost.parameters, "total": cost.total},
                "forward_flops_per_token": cost.forward_flops,
                "epoch_seconds": epochs[name],
                "seconds_per_epoch": seconds[name],
                "time_saved": 1 - seconds[name] / next(iter(seconds.values())),
                "latency_ms": 1000 * latency[name],
                "tokens_per_second": THROUGHPUT[0] * THROUGHPUT[1] / inference[name],
                "peak_memory_bytes": peak_memory(ClassifierSettings(model.config, device), ClassifierStep),
            }
        )
    shapes = {"finetuning": FINETUNING, "latency": LATENCY, "throughput": THROUGHPUT}
    return {"task": task_name, "rows": len(splits["train"]), "rounds": rounds, "shapes": shapes, "models": measured}


def _new_classifier(config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    if isinstance(config, SharedAttentionConfig):
        fix_coefficients(model)  # as in every finished model
    return model


def _random_ids(model: PreTrainedModel, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, device=model.device)


def _epoch_seconds(
    paths: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    splits: dict[str, Dataset],
    rounds: int,
    device: str,
) -> dict[str, list[float]]:
    """Return the seconds of an epoch of each model in every round, without loading, evaluating and saving."""
    seconds = {name: [] for name in paths}
    for seed in range(rounds):
        for name, path in paths.items():
            with tempfile.TemporaryDirectory() as folder:
                args = FinetuningArguments(
                    output_dir=folder,
                    seed=seed,
                    num_train_epochs=1,
                    per_device_train_batch_size=FINETUNING[0],
                    eval_strategy="no",
                    use_cpu=device == "cpu",
                    disable_tqdm=True,
                )
                result = finetune(path, tokenizer, task, splits, args, FINETUNING[1])
            seconds[name].append(result["metrics"]["train_runtime"])
    return seconds


def _inference_seconds(models: dict[str, PreTrainedModel], shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Return the median seconds of each model."""
    times = take_turns({name: Inference(model, shape) for name, model in models.items()}, rounds, warmup=2)
    return {name: statistics.median(measured) for name, measured in times.items()}


def efficiency_table(result: dict[str, Any]) -> str:
    """Format the result of `measure_efficiency` as a Markdown table with aligned columns, its settings above it."""
    finetuning, latency, throughput = ("{} × {}".format(*shape) for shape in result["shapes"].values())
    lines = [
        f"An epoch is {result['rows']:,} rows of {result['task']}, fine-tuned in batches of at most {finetuning} "
        f"tokens, which memory is measured with; latency of {latency} tokens, throughput at {throughput}; medians of "
        f"{result['rounds']} rounds.",
        "",
    ]
    rows = [_cells(row) for row in result["models"]]
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for name, *numbers in table:
        cells = [f"{name:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        **{group: f"{number:,}" for group, number in row["parameters"].items()},
        "FLOPs/token": f"{row['forward_flops_per_token']:,.0f}",
        "s/epoch": f"{row['seconds_per_epoch']:.2f}",
        "time saved": f"{row['time_saved']:.1%}",
        "latency ms": f"{row['latency_ms']:.2f}",
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "peak MiB": f"{row['peak_memory_bytes'] / 2**20:,.0f}",
    }
