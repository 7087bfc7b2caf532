"""SQuAD: a model fine-tuned with several seeds, one record for each run, and their table."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..data import first_rows, load_tokenizer
from ..data.squad import load_squad
from ..training.arguments import FinetuningArguments, option, read_overrides
from ..training.question_answering import RESULTS, finetune_squad
from .efficiency import environment
from .records import (
    SeededArguments,
    check_settings,
    format_scores,
    load_records,
    record_path,
    run_settings,
    save_record,
)
from .tables import markdown_table


@dataclass(kw_only=True)
class SquadArguments(SeededArguments):
    """What is fine-tuned on question answering, and on which files.

    Raises:
        ValueError: see `SeededArguments`.
    """

    model: str = field(
        metadata={"help": "A folder, or a name on the Hub: an encoder of this package or transformers."}
    )
    train_file: str = field(metadata={"help": "A .parquet, .jsonl or .json file in the Hub's columns of SQuAD."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})
    intermediate_file: str | None = option(None, "The same, to train on first.")
    kind: str = option("squad", "Of the recipe.", choices=["squad"])
    tokenizer_name: str | None = option(None, "Else the model's own.")
    max_length: int = option(384, "Tokens of a window, question included.")
    stride: int = option(128, "Tokens that neighbouring windows share.")
    without_answers: bool = option(False, "SQuAD v2.0: questions may have no answer.")
    n_best: int = option(20, "Answers that are kept of each question.")
    max_answer_tokens: int = option(30, "Tokens of the longest answer.")


def run_squad(arguments: SquadArguments, training_args: FinetuningArguments) -> list[dict[str, Any]]:
    """Fine-tune with all seeds, and write records and a table into `output_dir`; runs with a record are skipped.

    Raises:
        ValueError: invalid arguments or files, or results of other settings in `output_dir`, before any training.
    """
    output = Path(training_args.output_dir)
    tokenizer = load_tokenizer(arguments.tokenizer_name or arguments.model)
    settings = run_settings(arguments, training_args)
    check_settings(output, settings)
    files = {"train": arguments.train_file, "validation": arguments.validation_file}
    if arguments.intermediate_file is not None:
        files["intermediate"] = arguments.intermediate_file
    rows = {split: load_squad(path) for split, path in files.items()}
    for split, limit in (("train", arguments.max_train_samples), ("validation", arguments.max_eval_samples)):
        rows[split] = first_rows(rows[split], limit)
    for seed in arguments.seed_numbers:
        path = record_path(output, "squad", seed)
        if path.exists():
            continue
        record = _run(seed, arguments, training_args, tokenizer, rows)
        if training_args.process_index == 0:
            save_record(path, {**record, "settings": settings})
            print(f"squad, seed {seed}: exact match {record['exact_match']:.2f}, F1 {record['f1']:.2f}", flush=True)
            _print_lost(record)
    records = load_records(output)
    if training_args.process_index == 0:
        (output / "squad.md").write_text(squad_table({arguments.model: records}))
    return records


def _run(seed: int, arguments: SquadArguments, training_args: FinetuningArguments, tokenizer, rows) -> dict[str, Any]:
    options = {
        name: getattr(arguments, name)
        for name in ("max_length", "stride", "without_answers", "n_best", "max_answer_tokens")
    }
    options["config_overrides"] = read_overrides(arguments.config_overrides or "")
    model = arguments.model
    # The intermediate set is a first stage, from whose model the second starts.
    for stage in ("intermediate", "train"):
        if stage not in rows:
            continue
        folder = Path(training_args.output_dir, *(["intermediate"] if stage == "intermediate" else []), f"seed-{seed}")
        if stage == "intermediate" and (folder / RESULTS).is_file():  # of an interrupted command
            model = str(folder)
            continue
        args = replace(training_args, output_dir=str(folder), seed=seed, overwrite_output_dir=True)
        data = {"train_file": getattr(arguments, f"{stage}_file")}
        result = finetune_squad(model, tokenizer, rows[stage], rows["validation"], args, **options, data=data)
        model = str(folder)
    of_run = {"model": arguments.model, "task": "squad", "seed": seed, "epoch": "last"}
    return {**of_run, "metric": "f1", "score": result["f1"] / 100, **result, **environment(args.device.type)}


def _print_lost(record: dict[str, Any]):
    """Say which questions could not be used as they are."""
    for split in ("train", "validation"):
        for name, text in (
            ("misplaced", "left out: the answer is not at its place in the context"),
            ("uncovered", "left out: no window shows the whole answer"),
            ("shortened", "cut, to leave room for the context"),
        ):
            if number := len(record[split][name]):
                print(f"  {split}: {number} questions were {text}", flush=True)


def squad_table(records: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table of exact match and F1, mean ± standard deviation over the seeds, a row per model."""
    rows = [
        [model, *(format_scores([record[metric] for record in found]) for metric in ("exact_match", "f1"))]
        for model, found in records.items()
    ]
    return markdown_table(["model", "exact match", "F1"], rows)
