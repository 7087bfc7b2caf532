"""Fine-tuning on extractive question answering."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from ..data.squad import (
    best_answers,
    best_threshold,
    evaluation_windows,
    squad_scores,
    training_windows,
    with_threshold,
)
from .arguments import FinetuningArguments
from .finetuning import FinetuningTrainer, check_max_length, load_for_task
from .run import run_training, starting_checkpoint

RESULTS = "squad_results.json"  # the last file of a run


def finetune_squad(
    name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset,
    training_args: FinetuningArguments,
    max_length: int = 384,
    stride: int = 128,
    without_answers: bool = False,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    config_overrides: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tune an encoder on SQuAD, and save it with its tokenizer and `predictions.json` into `output_dir`.

    Args:
        train, validation: rows of `load_squad`.
        max_length, stride: see `training_windows`.
        without_answers: whether questions may have no answer (v2.0); the threshold for that is tuned on `validation`.
        n_best, max_answer_tokens: see `best_answers`.

    Returns:
        `exact_match` and `f1` in percent, the `threshold` or None, what became of the questions (see `WindowReport`)
        under `train` and `validation`, and `metrics` of training.

    Raises:
        ValueError: a decoder, a tokenizer that is not fast, a window longer than the model's positions, or no question
            to train on.
    """
    if tokenizer.cls_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no [CLS], which stands for no answer: give an encoder")
    check_max_length(name_or_path, max_length)
    checkpoint = starting_checkpoint(training_args)
    set_seed(training_args.seed)
    model = load_for_task(AutoModelForQuestionAnswering, name_or_path, tokenizer, config_overrides)
    windows, of_train = training_windows(train, tokenizer, max_length, stride)
    of_validation, report = evaluation_windows(validation, tokenizer, max_length, stride)
    # Evaluation is of whole questions, after training.
    training_args.eval_strategy = "no"
    trainer = FinetuningTrainer(
        model=model,
        args=training_args,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        train_dataset=windows,
        eval_dataset=of_validation.remove_columns(["id", "offsets"]),
    )
    trainer.remove_callback(PrinterCallback)
    data = {"dataset_name": None, **(data or {})}
    metrics = run_training(trainer, checkpoint, "fine-tuning", data, loss_name="loss")
    # Trainer would predict in the order of lengths, too.
    training_args.train_sampling_strategy = "sequential"
    starts, ends = (np.asarray(logits) for logits in trainer.predict(trainer.eval_dataset).predictions[:2])
    contexts = dict(zip(validation["id"], validation["context"], strict=True))
    answers = best_answers(of_validation, starts, ends, contexts, n_best, max_answer_tokens)
    threshold = best_threshold(answers, validation) if without_answers else None
    predictions = {name: answer.text for name, answer in answers.items()}
    if threshold is not None:
        predictions = with_threshold(answers, threshold)
    scores = squad_scores(predictions, validation, without_answers)
    evaluation = {name: value for name, value in metrics.items() if name.startswith("eval_")}
    trainer.save_metrics("eval", {**evaluation, **{f"eval_{name}": score for name, score in scores.items()}})
    result = {
        **scores,
        "threshold": threshold,
        "train": asdict(of_train),
        "validation": asdict(report),
        "metrics": metrics,
    }
    if trainer.is_world_process_zero():
        folder = Path(training_args.output_dir)
        (folder / "predictions.json").write_text(json.dumps(predictions, indent=1))
        (folder / "n_best.json").write_text(json.dumps({name: asdict(a) for name, a in answers.items()}, indent=1))
        (folder / RESULTS).write_text(json.dumps(result, indent=2) + "\n")
    return result
