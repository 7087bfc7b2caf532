"""What smaller attention costs a trained decoder: conversions of several sizes, fitted and healed."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import calibration_batches, load_documents
from ..injection import share
from ..injection.linear import features
from ..injection.targets import find_attention, layer_names, linear_maps
from ..plotting import legend, tidy
from ..training import DataArguments
from .efficiency import environment
from .likelihood import blimp_accuracy, perplexity
from .records import save_record
from .short_healing import heal_shortly
from .tables import markdown_table

SAVED = (0.1, 0.2, 0.33, 0.5)
_BLOCK_SIZE = 512
_BATCH_SIZE = 8
_WINDOW = 1024  # tokens that perplexity reads at once
_STYLES = {"fitted": {"linestyle": ":", "markerfacecolor": "white"}, "healed": {}}
_STAGES = tuple(_STYLES)


def conversions(model: PreTrainedModel, saved: float) -> dict[str, dict[str, Any]]:
    """Return the options of `share` that remove the fraction `saved` of attention's parameters, by name.

    The rank of `low_rank` is the mean; `spread_rank` gives each matrix its part of it.

    Raises:
        ValueError: so little is left that some have no options.
    """
    maps = linear_maps(model.base_model)
    (stack,) = find_attention(model.base_model)
    layers = {role: layer_names(maps, stack[role]) for role in ("query", "key", "value", "output")}
    shapes = [features(maps[names[0]]) for names in layers.values()]
    per_layer = sum(rows * columns for rows, columns in shapes)
    per_rank = sum(rows + columns for rows, columns in shapes)
    num_layers = len(layers["query"])
    kept = (1 - saved) * num_layers  # in layers
    atoms = round(kept)
    rank = int((kept - 3) * per_layer / (num_layers * per_rank))
    if not 3 <= atoms <= num_layers or rank < 1:
        raise ValueError(f"{saved=} leaves matrices of {kept:.2f} layers; 3 atoms with a rank need more")

    def residual(atoms: int) -> dict[str, Any]:
        return {"rank": int((kept - atoms) * per_layer / (num_layers * per_rank)), "spread_rank": True}

    # Zhussip et al. (arXiv 2508.04581) do not align.
    common = {"depth_shared_matrices": "qkvo", "align": False}
    masa = {**common, "depth_sharing": "masa", "num_atoms": atoms}
    in_groups = {**masa, "dictionary_groups": 3}
    sequential = {**common, "depth_sharing": "sequential", "num_groups": atoms}
    return {
        "masa": masa,
        "masa, 3 groups": in_groups,
        "masa, 3 groups, aligned": {**in_groups, "align": True},
        "masa, 3 atoms in 3 groups, + rank": {**in_groups, "num_atoms": 3, **residual(3)},
        "masa, 1 atom, + rank": {**masa, "num_atoms": 1, **residual(1)},
        "low_rank": {**common, "depth_sharing": "low_rank", **residual(0)},
        "sequential": sequential,
        "sequential, aligned": {**sequential, "align": True},
    }


@dataclass
class DecoderConversions:
    """Measure the conversions of a decoder: its perplexity on text and its accuracy on minimal pairs (BLiMP).

    Args:
        original: a causal language model.
        held_out: texts for the perplexity.
        pairs: of BLiMP (see `blimp_accuracy`).
        text: a file to calibrate and heal on.
        heal_steps: steps of healing, the same for all; 0 heals nothing.
        calibration_tokens: to fit on.
    """

    original: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    held_out: list[str]
    pairs: list[dict[str, str]]
    text: str
    heal_steps: int = 200
    calibration_tokens: int = 2**16
    calibration: list[dict[str, torch.Tensor]] = field(init=False)

    def __post_init__(self):
        documents = load_documents(train_file=self.text)["train"]
        batches = calibration_batches(documents, self.tokenizer, self.calibration_tokens, _BLOCK_SIZE)
        self.calibration = list(batches)

    def quality(self, model: PreTrainedModel) -> dict[str, float]:
        model.eval()
        found = perplexity(model, self.tokenizer, self.held_out, window=_WINDOW)
        blimp = blimp_accuracy(model, self.tokenizer, self.pairs)["overall"]
        return {"perplexity": found["per_token"], "per_word": found["per_word"], "blimp": blimp["accuracy"]}

    def run(self, output: Path, saved: Iterable[float] = SAVED, names: Iterable[str] | None = None):
        """Measure the rows `names` (all by default) at each size, and write a record of each into `output`.

        Rows that have a record are skipped, so that an interrupted run can be continued, and several processes can
        share the work. `results.json`, `results.md` and `results.png` have what is there in the end.

        Raises:
            ValueError: an unknown name, or a fraction that cannot be saved; before anything is measured.
        """
        options = {fraction: conversions(self.original, fraction) for fraction in saved}
        for by_name in options.values():
            if unknown := sorted(set(names or ()) - by_name.keys()):
                raise ValueError(f"no conversion is named {unknown[0]!r}; there are {'; '.join(by_name)}")
        output.mkdir(parents=True, exist_ok=True)
        self._record(output / "original.json", self.measure_original)
        for fraction, by_name in options.items():
            for name in names or by_name:
                path = output / f"{name.replace(' ', '_').replace(',', '')}-{fraction}.json"
                self._record(path, partial(self.measure, name, fraction, by_name[name]))
        write_results(output)

    def _record(self, path: Path, measure: Callable[[], dict[str, Any]]):
        if path.exists():
            return
        print(f"\n== {path.stem}", flush=True)
        record = {**measure(), "text": Path(self.text).name, **environment(self.original.device.type)}
        save_record(path, record)
        print({stage: record[stage] for stage in _STAGES if stage in record}, flush=True)

    def measure_original(self) -> dict[str, Any]:
        quality = self.quality(self.original)
        return {"name": "original", "saved": 0.0, "parameters": self.original.num_parameters(), "fitted": quality}

    def measure(self, name: str, wanted: float, options: dict[str, Any]) -> dict[str, Any]:
        """Convert, and heal what was converted."""
        converted, report = share(self.original, calibration=self.calibration, **options)
        row = {
            "name": name,
            "options": options,
            "wanted": wanted,
            "saved": 1 - report.parameters_after / report.parameters_before,
            "parameters": report.total_after,
            "fitted": self.quality(converted),
            "report": report.to_dict(),
        }
        if self.heal_steps:
            data_args = DataArguments(train_file=self.text, block_size=_BLOCK_SIZE)
            row["healing"] = heal_shortly(
                converted, self.original, self.tokenizer, data_args, self.heal_steps, _BATCH_SIZE, learning_rate=3e-4
            )
            row["healed"] = self.quality(converted)
        return row


def write_results(folder: Path):
    """Write the table and the plot of the records in a folder to `results.json`, `results.md` and `results.png`.

    Raises:
        ValueError: the folder has no record of the original.
    """
    if not (folder / "original.json").exists():
        raise ValueError(f"{folder} has no original.json")
    rows = [json.loads(path.read_text()) for path in folder.glob("*-*.json")]
    rows.sort(key=lambda row: (row["wanted"], row["name"]))
    result = {"original": json.loads((folder / "original.json").read_text()), "rows": rows}
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "results.md").write_text(table(result))
    draw(result, folder / "results.png")


def table(result: dict[str, Any]) -> str:
    """Return the results as a Markdown table: perplexity per token, and BLiMP in percent."""
    stages = [stage for stage in _STAGES if any(stage in row for row in result["rows"])]
    header = ["", "attention saved", *(f"{what}, {stage}" for what in ("perplexity", "BLiMP") for stage in stages)]
    rows = []
    for row in (result["original"], *result["rows"]):
        cells = [f"`{row['name']}`", f"{row['saved']:.1%}"]
        for key, number in (("perplexity", _perplexity), ("blimp", "{:.1%}".format)):
            cells += [number(row[stage][key]) if stage in row else "" for stage in stages]
        rows.append(cells)
    return markdown_table(header, rows)


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def draw(result: dict[str, Any], path: Path):
    """Draw perplexity and BLiMP against the attention parameters that are left, with the original as a line."""
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    for place, (key, label) in enumerate((("perplexity", "perplexity per token"), ("blimp", "BLiMP accuracy"))):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="attention parameters kept (%)", ylabel=label)
        axes.axhline(result["original"]["fitted"][key], color="#555555", linewidth=1, label="original")
        for number, name in enumerate(sorted({row["name"] for row in result["rows"]})):
            for stage, style in _STYLES.items():
                rows = [row for row in result["rows"] if row["name"] == name and stage in row]
                if rows:
                    kept, values = [100 * (1 - row["saved"]) for row in rows], [row[stage][key] for row in rows]
                    look = {**style, "marker": "osD^v*PX"[number], "color": f"C{number}"}
                    axes.plot(kept, values, **look, label=f"{name}, {stage}")
        if key == "perplexity":
            axes.set_yscale("log")
        tidy(axes, grid="y")
    legend(figure)
    figure.savefig(path)
