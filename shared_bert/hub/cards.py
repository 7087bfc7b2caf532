"""Model cards, written from a checkpoint's own files: what it shares, its training and its results."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from ..conversion.families import STOCK_CLASSES, family_of
from ..conversion.report import attention_parameters
from ..injection.share import replaced_parameters
from ..injection.sharing_config import SharingConfig, sharing_record
from ..modeling import Scheme

_AUTO_CLASSES = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModel")]
# A card with this line is replaced by the next push; one without it is the user's own, and stays.
MARK = "Written by shared_bert. The next push"
# By head: the Hub's name of the task, and the intended use.
_HEADS = {
    "ForMaskedLM": ("fill-mask", "Filling in masked tokens, and fine-tuning on other tasks."),
    "ForCausalLM": ("text-generation", "Continuing a text, and fine-tuning."),
    "ForSequenceClassification": ("text-classification", "Classifying or scoring whole texts or pairs."),
    "ForTokenClassification": ("token-classification", "Classifying each token."),
    "ForQuestionAnswering": ("question-answering", "Marking the answer to a question in a text."),
    "ForMultipleChoice": (None, "Choosing among continuations of a text."),
    "ForImageClassification": ("image-classification", "Classifying images."),
    "ForObjectDetection": ("object-detection", "Finding objects in images."),
    "LMHeadModel": ("text-generation", "Continuing a text, and fine-tuning."),
    "ForConditionalGeneration": (None, "Generating text from its input, and fine-tuning."),
    "Model": ("feature-extraction", "Hidden states as features, and fine-tuning with a head."),
}
_DEPTH = {
    "none": "Each layer has its own matrices.",
    "masa": "The {matrices} matrices of all {layers} layers are mixtures of {config.num_atoms} atoms per matrix "
    "([MASA](https://arxiv.org/abs/2508.04581)).",
    "sequential": "Neighbouring layers share their {matrices} matrices, in {config.num_groups} groups.",
    "repeat_all_over": "A stack of {config.num_groups} layers' {matrices} matrices is repeated over the depth.",
    "low_rank": "The {matrices} matrices are products of two low-rank factors.",
}
# Endings of `Trainer`'s metrics that are not results.
_NO_RESULTS = ("_time", "_runtime", "_samples", "_per_second")
_RESULT_NAMES = {
    ("pre-training", "loss"): "loss (nats per predicted token)",
    ("healing", "loss"): "distance from the original (see `HealingTrainer`)",
}


def model_card(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    repo_id: str,
    run_folder: str | Path | None = None,
    revision: str | None = None,
    as_stock: bool = False,
    has_tokenizer: bool = True,
    tags: list[str] | None = None,
) -> ModelCard:
    """Return the card of a model of this package, or of a stock model that shares.

    Args:
        model_class: one of `STOCK_CLASSES`, or a class built on one, which is described as that one; or the class of a
            stock model whose config records what it shares.
        run_folder: the folder of the run or checkpoint, whose files record its training and its results.
        revision: the branch that the model is pushed to, for the example code.
        as_stock: the model is pushed as the stock model that `to_stock` or `dequantize` makes of it.
        has_tokenizer: whether a tokenizer is pushed with it.
        tags: in addition to the package's own.
    """
    record = sharing_record(config)
    known = next((cls for cls in model_class.__mro__ if cls in STOCK_CLASSES), model_class)
    stock = model_class.__name__ if record else STOCK_CLASSES[known].__name__
    head = next((name for name in _HEADS if known.__name__.endswith(name)), "Model")
    task, use = _HEADS[head]
    auto = _auto_class(known, config)
    run = _Run(run_folder)
    name = repo_id.split("/")[-1]
    # Healing minimises a distance from the original, not a loss of the task.
    indexed = {} if run.kind == "healing" else {m: v for m, v in run.results.items() if math.isfinite(v)}
    results = [
        EvalResult(task or head, run.data_id, run.data_id, *result, dataset_config=run.dataset_config)
        for result in indexed.items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["shared_bert", *(record or config).sharing_names, *(tags or [])],
        datasets=[run.dataset] if run.dataset else None,
        metrics=list(indexed) or None,
        model_name=name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        mark=MARK,
        name=name,
        summary=_summary(model_class, config, record, stock if as_stock else None),
        sharing=_sharing(config) if record is None else _sharing_of_record(record),
        savings=_savings(known, config) if record is None else _savings_of_record(known, config, record),
        as_stock=as_stock,
        is_injected=record is not None,
        is_own_class=known is not model_class,
        architecture=stock if as_stock else model_class.__name__,
        use=use,
        training=run.training or ["Nothing was recorded with this checkpoint."],
        data=run.data,
        results={_RESULT_NAMES.get((run.kind, metric), metric): value for metric, value in run.results.items()},
        positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        auto=auto,
        has_tokenizer=has_tokenizer,
        repo_id=repo_id,
        at=f', revision="{revision}"' if revision else "",
        stock=stock,
    )


def _auto_class(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str:
    """Return the name of the Auto class that loads a class."""
    if hasattr(config, "auto_classes"):
        return next(auto for auto, cls in config.auto_classes.items() if cls == model_class.__name__)
    autos = (auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping)
    named = (auto.__name__ for auto in autos if auto._model_mapping[type(config)] is model_class)
    return next(named, model_class.__name__)


def _summary(model_class: type, config: PreTrainedConfig, record: SharingConfig | None, stock: str | None) -> str:
    exported = f", exported as a plain `{stock}`" if stock else ""
    if record is not None:
        return f"A `{model_class.__name__}` whose attention shares its weights{exported}."
    return (
        f"A {family_of(config).description} of {config.num_hidden_layers} layers and hidden size {config.hidden_size} "
        f"(`{model_class.__name__}`) with `{config.attention_scheme}` attention{exported}."
    )


def _sharing(config: PreTrainedConfig) -> str:
    parts, scheme = _roles(config.scheme), config.scheme
    scale = scheme.scale if config.attention_scale is None else config.attention_scale
    if scale != 1:
        parts.append(f"the logits are scaled by {scale:g}")
    key_value_heads, heads = config.num_key_value_heads, config.num_attention_heads
    if key_value_heads != heads:
        parts.append(f"{key_value_heads} heads of key and value serve {heads} of the query")
    matrices = "query, key, value and output" if config.depth_shared_matrices == "qkvo" else "query, key and value"
    depth = _DEPTH[config.depth_sharing].format(config=config, layers=config.num_hidden_layers, matrices=matrices)
    if config.depth_sharing not in ("none", "low_rank") and (config.rank or config.layer_ranks):
        depth += " Each layer adds a low-rank matrix of its own."
    return f"In each layer {'; '.join(parts)}. {depth}"


def _roles(scheme: Scheme) -> list[str]:
    made = ", ".join(
        f"the {role} is {'the input itself' if matrix == 'x' else f'made by matrix *{matrix}*'}"
        for role, matrix in zip(("query", "key", "value"), scheme.roles, strict=True)
    )
    return [made, scheme.ingredient.words] if scheme.ingredient.words else [made]


def _sharing_of_record(record: SharingConfig) -> str:
    parts = _roles(record.scheme)
    if record.scheme.scale != 1:
        parts.append(f"the logits are scaled by {record.scheme.scale:g}")
    matrices = ", ".join(f"`{target}`" for target in record.targets)
    depth = _DEPTH[record.depth_sharing].format(config=record, layers="the", matrices=matrices)
    if record.depth_sharing not in ("none", "low_rank") and (record.rank or record.layer_ranks):
        depth += " Each layer adds a low-rank matrix of its own."
    return f"In each layer {'; '.join(parts)}. {depth}"


def _savings_of_record(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, record: SharingConfig
) -> list[dict[str, Any]]:
    with torch.device("meta"):
        model = model_class(config)
    standard_total = model.num_parameters()
    standard, own = replaced_parameters(model, replace(record, coefficient_source="direct"))
    return _rows({"what is shared": (own, standard), "whole model": (standard_total - standard + own, standard_total)})


def _savings(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> list[dict[str, Any]]:
    # A coefficient network counts as the coefficients that replace it after training.
    config = type(config).from_dict({**config.to_dict(), "coefficient_source": "direct"})
    with torch.device("meta"):
        own, standard = model_class(config), model_class(config.with_attention())
    counts = {
        "attention": (attention_parameters(own), attention_parameters(standard)),
        "whole model": (own.num_parameters(), standard.num_parameters()),
    }
    return _rows(counts)


def _rows(counts: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "own": mine, "standard": theirs, "saved": 1 - mine / theirs}
        for name, (mine, theirs) in counts.items()
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one mapping.

    Raises:
        ValueError: naming a file that holds anything else or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, not {type(content).__name__}")
    return content


class _Run:
    """The records in the files of a run, a conversion or a checkpoint; empty without files.

    Attributes:
        kind: "pre-training", "healing", "fine-tuning", or None if it is not known.
        dataset, dataset_config: the data set's name on the Hub, and its configuration, if it has them.
        data_id, data: the name of the evaluated text, for metadata and for the card's text.
        training: lines about data and budget.
        results: metrics of the last evaluation by name.
    """

    def __init__(self, folder: str | Path | None):
        at = folder and Path(folder).absolute()
        # A checkpoint is in the folder of its run.
        of_run = at and (at.parent if at.name.startswith("checkpoint-") else at)
        run = self._read(of_run, "run.json")
        run = run if run.keys() >= {"kind", "data", "training", "versions", "tokens_per_step"} else {}
        state = self._read(at, "trainer_state.json")
        self.kind = run.get("kind")
        given = run.get("data", {})
        name, file = given.get("dataset_name"), given.get("train_file")
        self.dataset = None if name == "python-docs" else name
        self.dataset_config = given.get("dataset_config_name")
        self.data_id = name or "text"
        of_config = f" ({self.dataset_config})" if self.dataset_config else ""
        self.data = f"`{name}`{of_config}" if name else f"local text (`{Path(file).name}`)" if file else "unnamed text"
        logged = next((log for log in reversed(state.get("log_history", [])) if "eval_loss" in log), {})
        metrics = self._read(at, "eval_results.json") or logged
        self.results = {
            metric.removeprefix("eval_"): value
            for metric, value in metrics.items()
            if metric.startswith("eval_") and isinstance(value, float | int) and not metric.endswith(_NO_RESULTS)
        }
        conversion = self._read(at, "conversion.json") or self._read(at and at / "converted", "conversion.json")
        self.training = [*self._training(run, state), *self._conversion(conversion)]

    @staticmethod
    def _read(folder: Path | None, name: str) -> dict[str, Any]:
        return read_json(folder / name) if folder and (folder / name).is_file() else {}

    def _training(self, run: dict, state: dict) -> Iterator[str]:
        if not run:
            return
        tokens = run["tokens_per_step"]  # None where rows differ in length, as in fine-tuning
        in_rows = f", in rows of {run['block_size']} tokens" if tokens else ""
        yield f"{run['kind'].capitalize()} on {self.data}{in_rows}."
        if "global_step" in state:
            steps = state["global_step"]
            of_tokens = f" of {tokens:,} tokens: {steps * tokens:,} tokens" if tokens else ""
            yield f"{steps:,} steps{of_tokens}."
        options = {name: run["data"].get(name) for name in ("mlm_probability", "whole_word_mask")} | run["training"]
        if options["max_steps"] > 0:
            del options["num_train_epochs"]
        yield "Options: " + ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
        yield "Versions: " + ", ".join(f"{name} {version}" for name, version in run["versions"].items())

    @staticmethod
    def _conversion(conversion: dict) -> Iterator[str]:
        report = conversion.get("report")
        if not report:
            return
        if "all_errors" in report:
            errors = ", ".join(f"{name} {error:.3f}" for name, error in report["all_errors"].items())
            found = f"whose attention had {report['parameters_before']:,} parameters; relative errors on "
            found += f"{report['measured_on']}: {errors}"
        else:  # of a stock model that shares
            found = f"which had {report['parameters_before']:,} parameters in the place of what is shared"
        yield f"Converted from a trained model, {found}"
