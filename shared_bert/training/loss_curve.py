"""The loss curve of a run as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any


def save_loss_curve(
    output_dir: str,
    log_history: list[dict[str, Any]],
    unigram_entropy: float | None,
    title: str,
    loss_name: str = "loss (nats per predicted token)",
):
    """Write `loss_curve.json` and `loss_curve.png`.

    Args:
        log_history: of `TrainerState`.
        unigram_entropy: of the training text in nats: the loss of a model that knows only the frequency of each
            token; None if it is not known.
        title, loss_name: of the picture and its axis.
    """
    curve = {
        "title": title,
        "unigram_entropy": unigram_entropy,
        "train": [{"step": log["step"], "loss": log["loss"]} for log in log_history if "loss" in log],
        "evaluation": [{"step": log["step"], "loss": log["eval_loss"]} for log in log_history if "eval_loss" in log],
    }
    Path(output_dir, "loss_curve.json").write_text(json.dumps(curve, indent=2), encoding="utf-8")
    _draw(curve, loss_name, Path(output_dir, "loss_curve.png"))


def _draw(curve: dict[str, Any], loss_name: str, path: Path):
    # Takes most of a second, which the first step need not wait for.
    from matplotlib.figure import Figure

    from ..plotting import tidy

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=loss_name, title=curve["title"])
    for name, style in (
        ("train", {"color": "#9ab8d6", "linewidth": 1.2}),
        ("evaluation", {"color": "#c44e52", "linewidth": 1.8, "marker": "o", "markersize": 4}),
    ):
        points = curve[name]
        axes.plot([point["step"] for point in points], [point["loss"] for point in points], label=name, **style)
    if (entropy := curve["unigram_entropy"]) is not None:
        axes.axhline(entropy, color="#555555", linestyle="--", linewidth=1, label=f"unigram entropy ({entropy:.2f})")
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes, grid="y")
    axes.legend(frameon=False)
    figure.savefig(path)
