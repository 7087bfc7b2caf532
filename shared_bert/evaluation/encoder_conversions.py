"""What conversions lose: a sentence encoder under every scheme and depth sharing, on sentence similarity."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conversion import from_stock
from ..data import calibration_batches, load_documents
from ..modeling import SCHEMES
from ..training import DataArguments
from .efficiency import environment
from .records import save_record
from .sentence_similarity import similarity_spearman
from .short_healing import heal_shortly
from .tables import markdown_table

_BLOCK_SIZE = 64
_CALIBRATION_TOKENS = 2**15
_BATCH_SIZE = 32
_HEAL_STEPS = 90
_LONG_HEAL_STEPS = {"masa, S = 3": 900}  # 20 minutes on a CPU
_COLUMNS = ("unaligned", "weights_only", "calibrated", "healed")


def conversions(num_layers: int) -> dict[str, dict]:
    """Return the options of `from_stock` for every row of the table, by name."""
    rows = {scheme: {"attention_scheme": scheme} for scheme in SCHEMES if scheme != "standard"}
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


@dataclass
class EncoderConversions:
    """Measure each conversion fitted to the weights alone, fitted to text, and healed.

    Args:
        original: a base model that embeds sentences.
        pairs, scores: of sentences, and their similarity (STS-B).
        text: to calibrate and heal on: a file, or the name of a data set.
        heal_steps: steps of healing; by default 900 for ``masa`` with 3 atoms, else 90.
    """

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[tuple[str, str]]
    scores: list[float]
    text: str
    heal_steps: int | None = None

    def __post_init__(self):
        self.source = {"train_file": self.text} if Path(self.text).exists() else {"dataset_name": self.text}
        documents = load_documents(**self.source)["train"]
        self.calibration = calibration_batches(documents, self.tokenizer, _CALIBRATION_TOKENS, _BLOCK_SIZE)

    def spearman(self, model: PreTrainedModel) -> float:
        return similarity_spearman(model, self.tokenizer, self.pairs, self.scores)

    def run(self, output: Path, names: Iterable[str] | None = None):
        """Measure the rows `names` (all by default), and write the table to `output`.json and `output`.md.

        Rows in an existing JSON file are kept, so that an interrupted run can be continued.
        """
        options = conversions(self.original.config.num_hidden_layers)
        path = output.with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            result = json.loads(path.read_text())
        else:
            result = {"original": self.spearman(self.original), "pairs": len(self.pairs), "rows": {}}
        for name in names or options:
            if name in result["rows"]:
                continue
            print(f"\n== {name}", flush=True)
            row = self.measure(name, options[name], result["original"])
            print({key: round(value, 4) for key, value in row["spearman"].items()}, flush=True)
            rows = {**result["rows"], name: {**row, "text": Path(self.text).name, **environment("cpu")}}
            result["rows"] = {name: rows[name] for name in options if name in rows}
            save_record(path, result)
        output.with_suffix(".md").write_text(card(result))

    def measure(self, name: str, options: dict, spearman_of_original: float) -> dict:
        """Convert with and without alignment and text, and heal the conversion that was fitted to text."""
        row = {"options": options, "spearman": {}}
        # Both options need text.
        textless = {k: value for k, value in options.items() if k not in ("spread_rank", "dictionary_groups")}
        if "depth_sharing" in options and "rank" not in options:
            unaligned, _ = from_stock(self.original, align=False, **textless)
            row["spearman"]["unaligned"] = self.spearman(unaligned)
        by_weights, report = from_stock(self.original, **textless)
        row["spearman"]["weights_only"] = self.spearman(by_weights)
        row["errors_of_weights"] = report.all_errors()
        start = time.perf_counter()
        converted, report = from_stock(self.original, calibration=self.calibration, **options)
        row["conversion_seconds"] = time.perf_counter() - start
        row["spearman"]["calibrated"] = self.spearman(converted)
        row["report"] = report.to_dict()
        print(report, flush=True)
        if spearman_of_original - row["spearman"]["calibrated"] > 1e-4:
            steps = self.heal_steps or _LONG_HEAL_STEPS.get(name, _HEAL_STEPS)
            data_args = DataArguments(**self.source, block_size=_BLOCK_SIZE)
            row["healing"] = heal_shortly(
                converted, self.original, self.tokenizer, data_args, steps, _BATCH_SIZE, learning_rate=5e-4
            )
            row["spearman"]["healed"] = self.spearman(converted)
        return row


_CARD = """# all-MiniLM-L6-v2, converted

The 6-layer, 384-wide BERT encoder of sentence-transformers, under other attention: Spearman correlation on STS-B
validation ({pairs} pairs; the original has {original:.4f}), and the error of the weights. Measured by
`scripts/convert_minilm.py`; `minilm_conversion.json` has every layer's errors.

- *unaligned*: fitted to the weights alone, as MASA's authors do: no head is turned or moved.
- *weights*: fitted to the weights alone, heads aligned; the dictionary in one group, all ranks alike.
- *text*: fitted on {tokens:,} tokens of calibration text.
- *healed*: that conversion, distilled on text from the original for the number of tokens in its row. The text is
  {text}; nothing of STS-B is used.
- *errors*: relative errors of the products query · key / value · output over all layers, each of what was fitted:
  of the matrices (*weights*), and of the matrices on the layers' inputs (*text*).

{table}"""
_HEADER = (
    "", "attention saved", "errors, weights", "errors, text", "unaligned", "weights", "text", "healed", "tokens",
    "minutes",
)  # fmt: skip


def card(result: dict) -> str:
    """Return the table of the results as Markdown."""
    rows = []
    for name, row in result["rows"].items():
        report, spearman, healing = row["report"], row["spearman"], row.get("healing", {})
        saved = 1 - report["parameters_after"] / report["parameters_before"]
        errors = [f"{e['logits']:.2f} / {e['result']:.2f}" for e in (row["errors_of_weights"], report["all_errors"])]
        cells = [f"`{name}`", f"{round(saved, 3) + 0.0:.1%}", *errors]
        cells += [f"{spearman[column]:.4f}" if column in spearman else "" for column in _COLUMNS]
        cells += [f"{healing['tokens']:,}", f"{healing['seconds'] / 60:.1f}"] if healing else ["", ""]
        rows.append(cells)
    texts = ", ".join(sorted({row["text"] for row in result["rows"].values()}))
    return _CARD.format(
        original=result["original"],
        pairs=result["pairs"],
        tokens=_CALIBRATION_TOKENS,
        text=texts,
        table=markdown_table(_HEADER, rows),
    )
