"""Model cards: what a checkpoint is, what it saves, what it was trained on and how it did, from its own files."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.report import attention_parameters
from ..conversion.stock import STOCK_CLASSES

# A card that says so is replaced by the next push; one without is somebody's own, and stays.
MARK = "Written by shared_bert. The next push writes it anew, unless this line is taken out."
# What a head is for: the Hub's name of the task, the Auto class, and what to do with it.
_HEADS = {
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM", "Filling in masked tokens, and fine-tuning on other tasks."),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM", "Going on with a text, and fine-tuning."),
    "ForSequenceClassification": (
        "text-classification", "AutoModelForSequenceClassification", "Classifying or scoring whole texts or pairs.",
    ),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification", "Classifying each token."),
    "ForQuestionAnswering": (
        "question-answering", "AutoModelForQuestionAnswering", "Marking the answer to a question in a text.",
    ),
    "ForMultipleChoice": (None, "AutoModelForMultipleChoice", "Choosing among continuations of a text."),
    "Model": ("feature-extraction", "AutoModel", "Hidden states as features, and fine-tuning with a head."),
}  # fmt: skip
_DEPTH = {
    "none": "Each layer has matrices of its own.",
    "masa": "The {matrices} matrices of all {layers} layers are mixtures of {config.num_atoms} atoms per matrix "
    "([MASA](https://arxiv.org/abs/2508.04581)).",
    "sequential": "Neighbouring layers share their {matrices} matrices, in {config.num_groups} groups.",
    "repeat_all_over": "A stack of {config.num_groups} layers' {matrices} matrices is repeated over the depth.",
    "low_rank": "The {matrices} matrices are products of two factors of a low rank.",
}


def model_card(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    repo_id: str,
    run_folder: str | Path | None = None,
    revision: str | None = None,
    as_stock: bool = False,
    tags: list[str] | None = None,
) -> ModelCard:
    """Writes the card of a model of this package.

    Args:
        model_class: one of `STOCK_CLASSES`; else the card says nothing of what is saved.
        run_folder: the folder of the run or checkpoint, whose files say what it was trained on and how it did.
        revision: the branch that the model is pushed to, for the example code.
        as_stock: the model is pushed as the stock model that `to_stock` makes of it.
        tags: besides the package's own.
    """
    head = next((name for name in _HEADS if model_class.__name__.endswith(name)), "Model")
    task, auto, use = _HEADS[head]
    stock = STOCK_CLASSES.get(model_class)
    run = _Run(run_folder)
    name = repo_id.split("/")[-1]
    results = [EvalResult(task or head, run.data_id, run.data, metric, value) for metric, value in run.results.items()]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["shared_bert", config.attention_scheme, *([config.depth_sharing] * (config.depth_sharing != "none"))]
        + (tags or []),
        datasets=[run.dataset] if run.dataset else None,
        metrics=list(run.results) or None,
        model_name=name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        mark=MARK,
        name=name,
        summary=_summary(model_class, config, stock.__name__ if as_stock else None),
        sharing=_sharing(config),
        savings=_savings(model_class, config) if stock else [],
        as_stock=as_stock,
        architecture=stock.__name__ if as_stock else model_class.__name__,
        use=use,
        training=run.training or ["Nothing was recorded with this checkpoint."],
        data=run.data,
        results=run.results,
        positions=config.max_position_embeddings,
        auto=auto,
        repo_id=repo_id,
        at=f', revision="{revision}"' if revision else "",
        stock=stock.__name__ if stock else "model",
    )


def _summary(model_class: type, config: PreTrainedConfig, stock: str | None) -> str:
    base = "BERT encoder" if config.model_type == "shared_bert" else "GPT-2-like decoder"
    exported = f", exported as a plain `{stock}`" if stock else ""
    return (
        f"A {base} of {config.num_hidden_layers} layers and hidden size {config.hidden_size} "
        f"(`{model_class.__name__}`) with `{config.attention_scheme}` attention{exported}."
    )


def _sharing(config: PreTrainedConfig) -> str:
    scheme = config.scheme
    roles = {role: getattr(scheme, role) for role in ("query", "key", "value")}
    made = ", ".join(
        f"the {role} is {'the input itself' if matrix == 'x' else f'made by matrix *{matrix}*'}"
        for role, matrix in roles.items()
    )
    besides = "; diagonals scale the channels of each role" * scheme.diagonals
    besides += "; a matrix per head stands between query and key" * scheme.pairwise
    matrices = "query, key, value and output" if config.depth_shared_matrices == "qkvo" else "query, key and value"
    depth = _DEPTH[config.depth_sharing].format(config=config, layers=config.num_hidden_layers, matrices=matrices)
    return f"In each layer {made}{besides}. {depth}"


def _savings(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> list[dict[str, Any]]:
    with torch.device("meta"):
        own, standard = model_class(config), model_class(config.with_attention())
    counts = {
        "attention": (attention_parameters(own), attention_parameters(standard)),
        "whole model": (own.num_parameters(), standard.num_parameters()),
    }
    return [
        {"name": name, "own": mine, "standard": theirs, "saved": 1 - mine / theirs}
        for name, (mine, theirs) in counts.items()
    ]


class _Run:
    """What the files of a run, a conversion or a checkpoint say of it; empty where there are none.

    Attributes:
        dataset: the data set's name on the Hub, if it has one.
        data_id, data: of what the results are about, for machines and for people.
        training: lines on data and budget.
        results: metrics of the last evaluation by name.
    """

    def __init__(self, folder: str | Path | None):
        # A checkpoint lies in the folder of its run, and what was healed beside what was converted.
        at = folder and Path(folder).absolute()
        self._folders = [at, at.parent, at / "converted"] if at else []
        run, state = self._read("run.json"), self._read("trainer_state.json", of_run=False)
        given = run.get("data", {})
        name, file = given.get("dataset_name"), given.get("train_file")
        self.dataset = None if name == "python-docs" else name
        self.data_id = name or "text"
        self.data = f"`{name}`" if name else f"local text (`{Path(file).name}`)" if file else "text that is not named"
        logged = next((log for log in reversed(state.get("log_history", [])) if "eval_loss" in log), {})
        metrics = self._read("eval_results.json", of_run=False) or logged
        times = ("runtime", "samples", "samples_per_second", "steps_per_second")
        self.results = {
            metric.removeprefix("eval_"): value
            for metric, value in metrics.items()
            if metric.startswith("eval_") and isinstance(value, float | int) and metric[5:] not in times
        }
        self.training = self._training(run, state)

    def _read(self, name: str, of_run: bool = True) -> dict[str, Any]:
        for folder in self._folders if of_run else self._folders[:1]:
            if (folder / name).is_file():
                return json.loads((folder / name).read_text(encoding="utf-8"))
        return {}

    def _training(self, run: dict, state: dict) -> list[str]:
        lines = []
        if run:
            lines.append(f"{run['kind'].capitalize()} on {self.data}, in rows of {run['block_size']} tokens.")
        if run and "global_step" in state:
            steps = state["global_step"]
            lines.append(
                f"{steps:,} steps of {run['tokens_per_step']:,} tokens: {steps * run['tokens_per_step']:,} tokens."
            )
        if run:
            lines.append("Options: " + ", ".join(f"{name}={value}" for name, value in run["training"].items()))
            lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()))
        if report := self._read("conversion.json").get("report"):
            lines.append(
                f"Converted from a trained model, whose attention had {report['parameters_before']:,} parameters; "
                f"relative errors on {report['measured_on']}: "
                + ", ".join(f"{name} {error:.3f}" for name, error in report["all_errors"].items())
            )
        return lines
