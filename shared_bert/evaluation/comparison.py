"""What a comparison compares: the variants, the narrower models beside them, and the settings that all share.

A comparison is a YAML file; `configs/comparisons` has some, and scripts/README.md lists the keys.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from ..data import load_tokenizer
from ..data.tasks import glue_task
from ..injection.sharing_config import sharing_record
from ..training.arguments import DataArguments, FinetuningArguments, ModelArguments, PretrainingArguments
from ..training.models import config_fields, make_model, pretraining_objective
from ..training.pretraining import padded_vocab_size
from ..training.recipe import parse_mapping
from ..training.yaml_files import check_keys, load_mapping
from .classification import GlueArguments
from .narrowing import narrower_fields
from .parameters import Cost, cost_of

TUNED = ("learning_rate", "weight_decay")  # what a sweep can choose for each variant
_OF_TOKENIZER = ("tokenizer_name", "tokenizer_vocab_size", "tokenizer_lowercase")
# What a comparison says otherwise, or does not have: its runs are short.
_NOT_OF_A_COMPARISON = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "streaming", "push_to_hub",
}  # fmt: skip
# The same for all variants, so that they read as many tokens in the same order.
_EQUAL = {
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "data_seed",
}  # fmt: skip
_DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.02,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}
_EVALUATIONS = {
    "texts": {"files", "max_documents", "window", "stride"},
    "blimp": {"pairs", "max_pairs"},
    "glue": None,  # options of fine-tuning
    "noise": {"task", "levels", "draws"},
}


@dataclass(frozen=True, eq=False)  # each is itself, also as a key
class Variant:
    """One model of a comparison.

    Args:
        name: letters, digits, `_`, `-`, `.` and `+`.
        model: fields of its config, with the `model_type`.
        sharing: options of `share`, for an architecture of transformers.
        training: options of pre-training that differ from the comparison's.
        published: what a paper reports of it, for the tables.
        is_narrow: whether it is a narrower standard model, found for others.
    """

    name: str
    model: dict[str, Any]
    sharing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    published: str = ""
    is_narrow: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What a record of this variant must agree in."""
        return {"model": self.model, "sharing": self.sharing, "training": self.training}

    @property
    def shares(self) -> bool:
        """Whether its attention is not the standard one, or its layers share."""
        config = self.new_model().config
        record = sharing_record(config) or config  # a config of transformers has neither field
        found = getattr(record, "attention_scheme", "standard"), getattr(record, "depth_sharing", "none")
        return found != ("standard", "none")

    def new_model(self) -> PreTrainedModel:
        """Return the model with random weights.

        Raises:
            ValueError: an unknown or invalid field, or sharing that it cannot do.
        """
        model_type = self.model.get("model_type")
        overrides = {name: value for name, value in self.model.items() if name != "model_type"}
        arguments = ModelArguments(model_type=model_type, config_overrides=overrides, tokenizer_vocab_size=1)
        try:
            # Its special tokens are the tokenizer's, which is not known yet.
            ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
            config = AutoConfig.for_model(**{**ids, **config_fields(arguments)})
            return make_model(config, sharing=self.sharing)
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"variant {self.name}: {error}") from error

    def cost(self, sequence_length: int, predicted_share: float) -> Cost:
        """See `cost_of`."""
        return cost_of(self.new_model(), sequence_length, predicted_share)


def non_embedding(cost: Cost) -> int:
    """Return the parameters outside the embeddings."""
    return cost.total - cost.parameters["embeddings"]


@dataclass(frozen=True)
class Claim:
    """What a paper says of variants, to be held against what is measured.

    Args:
        claim, source: in words, and where it is made.
        of: the variants it is about.
        against: what they are compared with: a variant, or "narrow", the narrower standard model of each.
        measure: see `Measure.key`.
        expected: "lower", "higher" or "same": how `of` minus `against` should be.
        within: for "same", the largest difference that counts as none.
    """

    claim: str
    source: str
    of: list[str]
    against: str
    measure: str
    expected: str
    within: float | None = None


@dataclass(frozen=True)
class Run:
    """A model to train: a variant with a seed; in a sweep, with options to try.

    Args:
        tuned: the learning rate and weight decay of a run of the sweep.
    """

    variant: Variant
    seed: int
    tuned: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        options = "".join(f"-{option}={value:g}" for option, value in self.tuned)
        return f"{self.variant.name}{options}-{self.seed}"


class Comparison:
    """A comparison, read and checked: nothing is written, and no text is read or needed.

    Args:
        path: a YAML file.
        **changes: keys that replace the file's, such as output_dir.

    Raises:
        ValueError: an unknown key; no variants, or two of one name; a model that cannot be made; a narrower model that
            cannot be found, or invalid options.
    """

    def __init__(self, path: str | Path, **changes):
        self.path = Path(path)
        stated = {**load_mapping(path), **changes}
        valid = (
            "model", "sharing", "variants", "baseline", "narrow", "seeds", "training", "sweep", "evaluation",
            "claims", "output_dir", "results_dir",
        )  # fmt: skip
        check_keys(stated, valid, str(path))
        self.training = {**_DEFAULTS, **(stated.get("training") or {})}
        self.seeds = _numbers(stated.get("seeds", [0, 1, 2]), "seeds", int)
        self.output_dir = Path(stated.get("output_dir", f"runs/comparisons/{self.path.stem}"))
        self.results_dir = Path(stated.get("results_dir", self.output_dir / "results"))
        self._check_training()
        self.model = {"vocab_size": self._vocab_size(), **(stated.get("model") or {})}
        self.sharing = stated.get("sharing") or {}
        self.variants = self._read_variants(stated.get("variants") or [])
        names = [variant.name for variant in self.variants]
        self.baseline = stated.get("baseline", names[0])
        if self.baseline not in names:
            raise ValueError(f"baseline={self.baseline!r} is none of the variants {', '.join(names)}")
        self.costs = {variant.name: self._cost(variant) for variant in self.variants}
        # The narrower standard model of each reduced variant, by name.
        self.narrow_of: dict[str, str] = {}
        if stated.get("narrow", True):
            self._add_narrower()
        self.sweep = self._read_sweep(stated.get("sweep") or {})
        self.evaluation = stated.get("evaluation") or {}
        self._check_evaluation()
        self.claims = [self._read_claim(claim) for claim in stated.get("claims") or []]

    @property
    def settings(self) -> dict[str, Any]:
        """What all records of a comparison must agree in."""
        return {"training": self.training, "sweep": self.sweep, "evaluation": self.evaluation}

    @property
    def objective(self) -> str:
        """ "mlm" or "clm"."""
        return pretraining_objective(self.model["model_type"])

    @property
    def tokens_per_step(self) -> int:
        _, data_args, training_args = self.arguments
        rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        return rows * data_args.block_size

    def tokens_of(self, run: Run) -> int:
        """Return how many tokens a run is trained on."""
        max_steps = self.arguments[2].max_steps
        return self.tokens_per_step * (self.sweep.get("max_steps", max_steps) if run.tuned else max_steps)

    @cached_property
    def arguments(self) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
        """The arguments of pre-training that all runs have in common."""
        return self._parse({})

    def flops_of(self, run: Run) -> float:
        """Return the floating-point operations of a run's training."""
        return 3 * self.costs[run.variant.name].forward_flops * self.tokens_of(run)

    def arguments_of(self, run: Run, tuned: dict[str, float], folder: Path, tokenizer: Path):
        """Return the arguments of `pretrain` for a run.

        Args:
            tuned: what a sweep has chosen for its variant.
        """
        if run.tuned:
            tuned = dict(run.tuned) | {name: self.sweep[name] for name in ("max_steps",) if name in self.sweep}
        model_args, data_args, training_args = self._parse({**run.variant.training, **tuned})
        overrides = {name: value for name, value in run.variant.model.items() if name != "model_type"}
        model_args = replace(
            model_args,
            model_type=run.variant.model["model_type"],
            config_overrides=overrides,
            sharing=run.variant.sharing,
            tokenizer_name=str(tokenizer),
            tokenizer_vocab_size=None,
        )
        return (
            model_args,
            data_args,
            replace(training_args, output_dir=str(folder), seed=run.seed, overwrite_output_dir=True),
        )

    def runs(self) -> list[Run]:
        """Return all runs in order: the sweep's, then every variant with the first seed, then with the next."""
        values = [[(name, value) for value in self.sweep[name]] for name in TUNED if name in self.sweep]
        swept = [
            Run(variant, self.sweep["seed"], tuned)
            for tuned in (product(*values) if values else ())
            for variant in self.variants
        ]
        return swept + [Run(variant, seed) for seed in self.seeds for variant in self.variants]

    def finetuning(self, model: str, seed: int) -> tuple[GlueArguments, FinetuningArguments]:
        """Return the arguments of fine-tuning a model on the tasks of the evaluation.

        Args:
            model: its folder, in which the results go to "glue".
        """
        stated = {"report_to": "none", "use_cpu": self.arguments[2].use_cpu, **self.evaluation["glue"]}
        stated |= {"output_dir": f"{model}/glue", "seeds": str(seed)}
        where = f"{self.path}: evaluation: glue"
        return parse_mapping(stated, (GlueArguments, FinetuningArguments), where, ["--model", model])

    def check_files(self):
        """Raise a ValueError if a file or folder that the evaluation reads is not there."""
        files = [*self.evaluation.get("texts", {}).get("files", {}).values()]
        files += [self.evaluation["blimp"]["pairs"]] if "blimp" in self.evaluation else []
        for name in files:
            if not Path(name).is_file():
                raise ValueError(f"{self.path}: evaluation: {name} is not a file")
        folder = self.evaluation.get("glue", {}).get("data_dir")
        if folder and not Path(folder).is_dir():
            raise ValueError(f"{self.path}: evaluation: data_dir={folder} is not a folder")

    def _parse(self, changes: dict[str, Any]) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
        options = {**self.training, "model_type": "shared_bert", "output_dir": str(self.output_dir), **changes}
        return parse_mapping(options, (ModelArguments, DataArguments, PretrainingArguments), str(self.path))

    def _check_training(self):
        of_model = {f.name for f in fields(ModelArguments)} - {*_OF_TOKENIZER, "attn_implementation"}
        for name in self.training:
            if name in _NOT_OF_A_COMPARISON | of_model:
                raise ValueError(f"{self.path}: training: {name} is not an option of a comparison's runs")
        _, _, training_args = self.arguments
        if training_args.max_steps <= 0:
            raise ValueError(f"{self.path}: training: give max_steps, so that all variants read as many tokens")

    def _vocab_size(self) -> int:
        model_args, _, _ = self.arguments
        return padded_vocab_size(model_args.tokenizer_vocab_size or len(load_tokenizer(model_args.tokenizer_name)))

    def _read_variants(self, stated: list[dict[str, Any]]) -> list[Variant]:
        if not stated:
            raise ValueError(f"{self.path}: variants: there are none")
        names = Counter(str(variant.get("name")) for variant in stated)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"{self.path}: variants: there are two of the name {twice[0]!r}")
        return [self._read_variant(dict(variant)) for variant in stated]

    def _read_variant(self, stated: dict[str, Any]) -> Variant:
        name = str(stated.pop("name", None))
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"{self.path}: variants: name={name!r} must be letters, digits, _, -, . and +")
        training = stated.pop("training", None) or {}
        valid = {f.name for f in fields(PretrainingArguments)} - _NOT_OF_A_COMPARISON - _EQUAL
        check_keys(training, valid, f"variant {name}: training")
        sharing, published = stated.pop("sharing", None) or {}, stated.pop("published", "")
        self._parse(training)
        return Variant(name, {**self.model, **stated}, {**self.sharing, **sharing}, training, published)

    def _cost(self, variant: Variant) -> Cost:
        _, data_args, _ = self.arguments
        share = data_args.mlm_probability if self.objective == "mlm" else 1.0
        return variant.cost(data_args.block_size, share)

    def _add_narrower(self):
        standard = next(variant for variant in self.variants if variant.name == self.baseline)
        whole = non_embedding(self.costs[self.baseline])
        if standard.shares:
            raise ValueError(
                f"{self.path}: the baseline {self.baseline} shares weights itself: choose a standard one for narrower "
                "models, or give narrow: false"
            )

        @cache
        def counted(hidden_size: int, intermediate_size: int) -> int:
            fields = {**standard.model, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
            with torch.device("meta"):
                return non_embedding(replace(standard, model=fields).cost(1, 1.0))

        for variant in [v for v in self.variants if not v.is_narrow]:
            wanted = non_embedding(self.costs[variant.name])
            if wanted > 0.99 * whole:
                continue
            near = [
                v.name
                for v in self.variants
                if v.is_narrow and abs(non_embedding(self.costs[v.name]) - wanted) <= 0.01 * wanted
            ]
            if not near:
                try:
                    fields = narrower_fields(
                        standard.model, wanted, lambda f: counted(f["hidden_size"], f["intermediate_size"])
                    )
                except ValueError as error:
                    raise ValueError(f"{self.path}: beside {variant.name}: {error}") from error
                name = f"narrow_{fields['hidden_size']}x{fields['intermediate_size']}"
                narrow = replace(standard, name=name, model=fields, published="", is_narrow=True)
                self.variants.append(narrow)
                self.costs[narrow.name] = self._cost(narrow)
                near = [narrow.name]
            self.narrow_of[variant.name] = near[0]

    def _read_sweep(self, stated: dict[str, Any]) -> dict[str, Any]:
        check_keys(stated, (*TUNED, "seed", "max_steps"), f"{self.path}: sweep")
        sweep = {name: _numbers(stated[name], f"sweep: {name}", float) for name in TUNED if name in stated}
        if sweep:
            # A seed of its own, so that what is reported is not what was chosen by.
            sweep["seed"] = stated.get("seed", max(self.seeds) + 1)
            if "max_steps" in stated:
                sweep["max_steps"] = stated["max_steps"]
        return sweep

    def _read_claim(self, stated: dict[str, Any]) -> Claim:
        where = f"{self.path}: claims"
        names = [f.name for f in fields(Claim)]
        check_keys(stated, names, where)
        if lacking := [name for name in names[:-1] if name not in stated]:
            raise ValueError(f"{where}: {stated} lacks {', '.join(lacking)}")
        of = stated["of"]
        of = [*self.narrow_of] if of == "reduced" else of if isinstance(of, list) else [of]
        claim = Claim(**{**stated, "of": of})
        known = {variant.name for variant in self.variants}
        if unknown := [
            name for name in (*of, *([] if claim.against == "narrow" else [claim.against])) if name not in known
        ]:
            raise ValueError(f"{where}: {unknown[0]!r} is none of the variants {', '.join(known)}")
        if claim.against == "narrow" and (lost := [name for name in of if name not in self.narrow_of]):
            raise ValueError(f"{where}: there is no narrower model beside {lost[0]}")
        if claim.expected not in ("lower", "higher", "same") or (claim.expected == "same") != (
            claim.within is not None
        ):
            raise ValueError(f"{where}: expected={claim.expected!r} must be lower or higher, or same with within")
        return claim

    def _check_evaluation(self):
        check_keys(self.evaluation, _EVALUATIONS, f"{self.path}: evaluation")
        for kind, options in self.evaluation.items():
            if _EVALUATIONS[kind] is not None:
                check_keys(options, _EVALUATIONS[kind], f"{self.path}: evaluation: {kind}")
        glue = self.evaluation.get("glue", {})
        if glue:
            self.finetuning("any", 0)
        if noise := self.evaluation.get("noise"):
            if noise["task"] not in str(glue.get("tasks", "")).split(","):
                raise ValueError(f"{self.path}: evaluation: noise needs task={noise['task']} among the tasks of glue")
            glue_task(noise["task"])


def _numbers(stated: Any, name: str, kind: type) -> list:
    """Return a list of different numbers.

    Raises:
        ValueError: it is something else.
    """
    values = stated if isinstance(stated, list) else [stated]
    if not values or any(not isinstance(value, int | kind) or isinstance(value, bool) for value in values):
        raise ValueError(f"{name}={stated!r} must be numbers")
    if len({*values}) < len(values):
        raise ValueError(f"{name}={stated!r} has one number twice")
    return [kind(value) for value in values]
