"""What a comparison measures of each trained model."""

from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ...data import load_documents, load_tokenizer
from ...data.tasks import glue_task, load_glue
from ...folders import load_any_model
from ..classification import run_classification
from ..likelihood import blimp_accuracy, document_losses, load_pairs
from ..robustness import noise_accuracy
from .comparison import Comparison
from .file import Blimp


def evaluate_run(comparison: Comparison, folder: Path, seed: int) -> dict[str, Any]:
    """Return what a comparison's `evaluation` asks for, of a trained model."""
    found = {}
    device = comparison.arguments[2].device
    model, tokenizer = load_any_model(str(folder)).eval().to(device), load_tokenizer(str(folder))
    if comparison.texts:
        files = comparison.texts.files
        found["texts"] = {name: _text_losses(comparison, model, tokenizer, path) for name, path in files.items()}
    if comparison.blimp:
        found["blimp"] = _blimp(model, tokenizer, comparison.blimp)
    if comparison.glue:
        records = run_classification(*comparison.finetuning(str(folder), seed))
        found["glue"] = {
            record["task"]: {name: record[name] for name in ("metric", "score", "metrics")} for record in records
        }
    if comparison.noise:
        found["noise"] = _noise(comparison, folder / "glue" / comparison.noise.task / f"seed-{seed}", seed)
    return found


def _text_losses(
    comparison: Comparison, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str
) -> dict[str, Any]:
    _, data_args, _ = comparison.arguments
    options = comparison.texts
    documents = load_documents(
        train_file=path, text_column=data_args.text_column, sample_by=data_args.sample_by, validation_split=None
    )["train"]
    # Evenly spaced: neighbours are often of one book.
    number = min(options.max_documents or len(documents), len(documents))
    texts = documents.select([i * len(documents) // number for i in range(number)])["text"]
    window = options.window or data_args.block_size
    losses = document_losses(
        model, tokenizer, texts, window, options.stride, mlm_probability=data_args.mlm_probability
    )
    return {
        "loss": losses.mean,
        "document_nats": [round(nats, 3) for nats in losses.nats],
        "document_tokens": losses.tokens,
    }


def _blimp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Blimp) -> dict[str, Any]:
    pairs = load_pairs(options.pairs, options.max_pairs)
    results = blimp_accuracy(model, tokenizer, pairs)
    numbers = Counter(pair["UID"] for pair in pairs)  # in the order of `by_paradigm`
    return {**results["overall"], "by_paradigm": results["by_paradigm"], "pairs_by_paradigm": numbers}


def _noise(comparison: Comparison, folder: Path, seed: int) -> list[dict[str, Any]]:
    options, (tasks, training_args) = comparison.noise, comparison.finetuning("any", seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval().to(training_args.device)
    rows = load_glue(options.task, tasks.data_dir)[glue_task(options.task).validation[0]]
    return noise_accuracy(
        model,
        load_tokenizer(str(folder)),
        rows,
        options.task,
        options.levels,
        options.draws,
        max_length=tasks.max_length,
    )
