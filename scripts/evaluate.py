"""Evaluate models: fine-tuned ones on noise and on other tasks, language models on minimal pairs and on text.

python scripts/evaluate.py noise --model runs/glue/sst2/seed-0 --task sst2 --data_dir path/to/glue
python scripts/evaluate.py cross_domain --model runs/glue/mrpc/seed-0 --task mrpc --on rte,qqp
python scripts/evaluate.py blimp --model runs/mine --pairs path/to/blimp.parquet
python scripts/evaluate.py perplexity --model runs/mine --text path/to/text.txt

Results are printed and written to OUTPUT as JSON, those of noise also as a plot. Commas separate several models.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification

from shared_bert.command_line import reports_user_errors
from shared_bert.data import load_documents, load_tokenizer
from shared_bert.data.tasks import glue_task, load_glue
from shared_bert.evaluation import blimp_accuracy, environment, perplexity
from shared_bert.evaluation.robustness import NOISE_LEVELS, cross_domain_accuracy, draw_noise, noise_accuracy
from shared_bert.folders import load_model
from shared_bert.training.converting import SOURCES


def validation_rows(name: str, parsed: argparse.Namespace):
    rows = load_glue(name, parsed.data_dir)[glue_task(name).validation[0]]
    return rows if parsed.max_rows is None else rows.select(range(min(parsed.max_rows, len(rows))))


def load_classifier(name_or_path: str):
    return AutoModelForSequenceClassification.from_pretrained(
        name_or_path, trust_remote_code=False, use_safetensors=True
    ).eval()


def noise(name_or_path: str, parsed: argparse.Namespace) -> list[dict[str, Any]]:
    model, tokenizer = load_classifier(name_or_path), load_tokenizer(name_or_path)
    rows = validation_rows(parsed.task, parsed)
    results = noise_accuracy(
        model, tokenizer, rows, parsed.task, parsed.levels, parsed.draws, max_length=parsed.max_length
    )
    for row in results:
        print(f"  noise {row['level']:4.0%}: accuracy {row['mean']:.2%} ± {row['std']:.2%}")
    return results


def cross_domain(name_or_path: str, parsed: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load_classifier(name_or_path), load_tokenizer(name_or_path)
    rows = {name: validation_rows(name, parsed) for name in parsed.on.split(",")}
    results = cross_domain_accuracy(model, tokenizer, parsed.task, rows, max_length=parsed.max_length)
    for name, accuracy in results.items():
        print(f"  {parsed.task} → {name}: accuracy {accuracy:.2%}")
    return results


def blimp(name_or_path: str, parsed: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(name_or_path, SOURCES).eval(), load_tokenizer(name_or_path)
    rows = load_dataset("parquet", data_files=parsed.pairs, split="train").to_list()
    if parsed.max_pairs is not None:
        of_paradigm = {}
        for row in rows:
            of_paradigm.setdefault(row["UID"], []).append(row)
        rows = [row for pairs in of_paradigm.values() for row in pairs[: parsed.max_pairs]]
    results = blimp_accuracy(model, tokenizer, rows, parsed.within_word)
    for name, accuracy in {**results["by_phenomenon"], "all": results["overall"]["accuracy"]}.items():
        print(f"  {name}: {accuracy:.2%}")
    return results


def perplexity_of(name_or_path: str, parsed: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load_model(name_or_path, SOURCES).eval(), load_tokenizer(name_or_path)
    # The file is its own validation text, so that no text is split off.
    documents = load_documents(train_file=parsed.text, validation_file=parsed.text)["train"]
    results = perplexity(model, tokenizer, documents["text"], parsed.stride, parsed.window)
    print(f"  perplexity {results['per_token']:.2f} per token, {results['per_word']:.2f} per word")
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("--model", required=True, help="folders or names on the Hub, separated by commas")
        command.add_argument("--output", type=Path, default=Path("runs", f"{name}.json"))
        command.set_defaults(run=run)
        return command

    for name, run, text in (
        ("noise", noise, "accuracy of fine-tuned models on noisy input embeddings"),
        ("cross_domain", cross_domain, "accuracy of fine-tuned models on other tasks"),
    ):
        command = add(name, run, text)
        command.add_argument("--task", required=True, help="the GLUE task that the models were fine-tuned on")
        command.add_argument("--data_dir", help="a folder per task; else the Hub")
        command.add_argument("--max_rows", type=int, help="evaluate on no more rows than this")
        command.add_argument("--max_length", type=int, default=128, help="tokens per row at most")
        if name == "noise":
            command.add_argument(
                "--levels", type=float, nargs="+", default=NOISE_LEVELS, help="shares of the mean norm"
            )
            command.add_argument("--draws", type=int, default=5, help="of the noise at each level")
        else:
            command.add_argument("--on", required=True, help="the tasks to evaluate on, separated by commas")
    command = add("blimp", blimp, "accuracy of language models on minimal pairs")
    command.add_argument("--pairs", required=True, help="a parquet file in the columns of BLiMP")
    command.add_argument("--within_word", action="store_true", help="mask the rest of a word too (encoders)")
    command.add_argument("--max_pairs", type=int, help="no more pairs of a paradigm than this")
    command = add("perplexity", perplexity_of, "perplexity of decoders")
    command.add_argument("--text", required=True, help="a .txt, .jsonl or .parquet file, a folder or a glob")
    command.add_argument("--stride", type=int, help="tokens that each window predicts; default: half a window")
    command.add_argument("--window", type=int, help="tokens read at once; default: as many as the model can read")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    if hasattr(parsed, "task"):
        glue_task(parsed.task)
    results = {}
    for name_or_path in parsed.model.split(","):
        print(name_or_path, flush=True)
        results[name_or_path] = parsed.run(name_or_path, parsed)
    options = {name: str(value) for name, value in vars(parsed).items() if name != "run"}
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"options": options, **environment("cpu"), "results": results}
    parsed.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {parsed.output}")
    if parsed.run is noise:
        picture = parsed.output.with_suffix(".png")
        draw_noise(results, parsed.task, picture)
        print(f"plot in {picture}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
