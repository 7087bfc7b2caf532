"""Evaluate models: fine-tuned ones on noise and on other tasks, language models on minimal pairs and on text.

python scripts/evaluate.py noise --model runs/glue/sst2/seed-0 --task sst2 --data_dir path/to/glue
python scripts/evaluate.py cross_domain --model runs/glue/mrpc/seed-0 --task mrpc --on rte,qqp
python scripts/evaluate.py blimp --model runs/mine --pairs path/to/blimp.parquet
python scripts/evaluate.py perplexity --model runs/mine --text path/to/text.txt
python scripts/evaluate.py scores --model runs/glue_mine,runs/glue_stock

Results are printed and written to OUTPUT as JSON, those of noise and scores also as a plot. Commas separate several
models. For noise and cross_domain, a model may be the output folder of finetune.py: all seeds of its task. "scores"
compares such folders, which must have the same settings.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from shared_bert.command_line import reports_user_errors
from shared_bert.data import first_rows, load_documents, load_tokenizer
from shared_bert.data.tasks import glue_task, load_glue
from shared_bert.evaluation import blimp_accuracy, environment, load_pairs, perplexity
from shared_bert.evaluation.records import load_compared, write_scores
from shared_bert.evaluation.robustness import (
    NOISE_LEVELS,
    cross_domain_accuracy,
    draw_noise,
    noise_accuracy,
    over_seeds,
    spread,
)
from shared_bert.folders import load_any_model


def validation_rows(name: str, parsed: argparse.Namespace):
    rows = load_glue(name, parsed.data_dir)[glue_task(name).validation[0]]
    return first_rows(rows, parsed.max_rows)


def load_classifier(name_or_path: str, device: str):
    model = AutoModelForSequenceClassification.from_pretrained(
        name_or_path, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().to(device)


def load_language_model(name_or_path: str, device: str):
    return load_any_model(name_or_path).eval().to(device)


def seeds_of(name_or_path: str, task: str) -> list[str]:
    """Return the models of all seeds in an output folder of finetune.py, or else the model itself."""
    return sorted(map(str, Path(name_or_path, task).glob("seed-*"))) or [name_or_path]


def noise(name_or_path: str, parsed: argparse.Namespace) -> list[dict[str, Any]]:
    rows = validation_rows(parsed.task, parsed)
    found = []
    for path in seeds_of(name_or_path, parsed.task):
        model, tokenizer = load_classifier(path, parsed.device), load_tokenizer(path)
        found.append(
            noise_accuracy(
                model, tokenizer, rows, parsed.task, parsed.levels, parsed.draws, max_length=parsed.max_length
            )
        )
    results = over_seeds(found)
    for row in results:
        print(f"  noise {row['level']:4.0%}: accuracy {row['mean']:.2%} ± {row['std']:.2%}")
    return results


def cross_domain(name_or_path: str, parsed: argparse.Namespace) -> dict[str, dict[str, Any]]:
    rows = {name: validation_rows(name, parsed) for name in parsed.on.split(",")}
    found = []
    for path in seeds_of(name_or_path, parsed.task):
        model, tokenizer = load_classifier(path, parsed.device), load_tokenizer(path)
        found.append(cross_domain_accuracy(model, tokenizer, parsed.task, rows, max_length=parsed.max_length))
    results = {name: spread([of_seed[name] for of_seed in found]) for name in rows}
    for name, result in results.items():
        print(f"  {parsed.task} → {name}: accuracy {result['mean']:.2%} ± {result['std']:.2%}")
    return results


def blimp(name_or_path: str, parsed: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_language_model(name_or_path, parsed.device), load_tokenizer(name_or_path)
    results = blimp_accuracy(model, tokenizer, load_pairs(parsed.pairs, parsed.max_pairs), parsed.within_word)
    for name, accuracy in {**results["by_phenomenon"], "all": results["overall"]["accuracy"]}.items():
        print(f"  {name}: {accuracy:.2%}")
    return results


def perplexity_of(name_or_path: str, parsed: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load_language_model(name_or_path, parsed.device), load_tokenizer(name_or_path)
    documents = load_documents(train_file=parsed.text, validation_split=None)["train"]
    results = perplexity(model, tokenizer, documents["text"], parsed.window, parsed.stride)
    print(f"  perplexity {results['per_token']:.2f} per token, {results['per_word']:.2f} per word")
    return results


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def add(name: str, run, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--model", required=True, help="folders, names on the Hub, or earlier outputs (.json), by commas"
        )
        command.add_argument("--output", type=Path, default=Path("runs", f"{name}.json"))
        if run is not None:
            default = "cuda" if torch.cuda.is_available() else "cpu"
            command.add_argument("--device", choices=["cpu", "cuda"], default=default)
        command.set_defaults(run=run, main=evaluate_models)
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
    command = add("scores", None, "tables and a plot of several output folders of finetune.py")
    command.add_argument("--may_differ", default="", help="settings that need not be the same, separated by commas")
    command.set_defaults(main=compare_scores)
    command = add("perplexity", perplexity_of, "perplexity of decoders")
    command.add_argument("--text", required=True, help="a .txt, .jsonl or .parquet file, a folder or a glob")
    command.add_argument("--stride", type=int, help="tokens that each window predicts; default: half a window")
    command.add_argument("--window", type=int, help="tokens read at once; default: as many as the model can read")
    parsed = parser.parse_args(arguments)
    if parsed.output.suffix != ".json":
        raise ValueError(f"--output {parsed.output} must end in .json")
    return parsed


def compare_scores(parsed: argparse.Namespace):
    records = load_compared(parsed.model.split(","), parsed.may_differ.split(","))
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    parsed.output.write_text(json.dumps(records, indent=1) + "\n")
    write_scores(records, parsed.output)
    print(parsed.output.with_suffix(".md").read_text())


def read_earlier(path: Path, options: dict[str, str]) -> dict[str, Any]:
    """Return what an earlier command with the same options has written.

    Raises:
        ValueError: it is no such file, or has other options.
    """
    try:
        record = json.loads(path.read_text())
        earlier = record["options"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an output of this command: {error!r}") from error
    for name, value in options.items():
        if name not in ("model", "output", "device") and earlier.get(name) != value:
            raise ValueError(f"{path} was measured with {name}={earlier.get(name)}, not {value}")
    return record


def evaluate_models(parsed: argparse.Namespace):
    if hasattr(parsed, "task"):
        glue_task(parsed.task)
    options = {name: str(value) for name, value in vars(parsed).items() if name not in ("run", "main")}
    models = parsed.model.split(",")
    earlier = [read_earlier(Path(name), options) for name in models if name.endswith(".json")]
    results = {name: result for record in earlier for name, result in record.pop("results").items()}
    for name_or_path in (name for name in models if not name.endswith(".json")):
        print(name_or_path, flush=True)
        results[name_or_path] = parsed.run(name_or_path, parsed)
    parsed.output.parent.mkdir(parents=True, exist_ok=True)
    record = {"options": options, **environment(parsed.device), "earlier": earlier, "results": results}
    parsed.output.write_text(json.dumps(record, indent=2) + "\n")
    if parsed.run is noise:
        draw_noise(results, parsed.task, parsed.output.with_suffix(".png"))


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    parsed.main(parsed)
    print(f"written to {parsed.output}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
