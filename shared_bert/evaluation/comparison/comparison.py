"""What a comparison compares: the variants, the narrower models beside them, and the settings that all share.

A comparison is a YAML file; `configs/comparisons` has some, and configs/README.md lists the keys.
"""

import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from ...data import load_tokenizer
from ...data.tasks import glue_task
from ...training.arguments import DataArguments, FinetuningArguments, ModelArguments, PretrainingArguments
from ...training.models import config_fields, make_model, new_config, pretraining_objective
from ...training.pretraining import check_pretraining, padded_vocab_size
from ...training.recipe import parse_mapping
from ...training.yaml_files import check_keys
from ..classification import GlueArguments
from ..parameters import Cost, cost_of
from .file import MAX_SEED, Blimp, Claim, File, Noise, Sweep, Texts, load_file, read_part
from .narrowing import WIDTHS, narrower_fields

# Options of pre-training that a comparison has; the others it states otherwise, or needs no answer to.
_OF_TOKENIZER = ("tokenizer_name", "tokenizer_vocab_size", "tokenizer_lowercase")
_NOT_OF_A_COMPARISON = {
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "seed", "streaming", "push_to_hub",
}  # fmt: skip
# Options that a variant may have of its own: none changes what it reads, or in which order.
_OF_VARIANT = {
    "learning_rate", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm",
}  # fmt: skip
_DEFAULTS = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "logging_steps": 0.02,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, since its fields are dicts
class Variant:
    """One model of a comparison.

    Args:
        name: letters, digits, `_`, `-`, `.` and `+`.
        model: fields of its config, with the `model_type`.
        sharing: options of `share`, for an architecture of transformers.
        training: options of pre-training that differ from the comparison's.
        published: what a paper reports of it, for the tables.
    """

    name: str
    model: dict[str, Any]
    sharing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    published: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What a record of this variant must agree in."""
        return {"model": self.model, "sharing": self.sharing, "training": self.training}

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of `ModelArguments` that make it."""
        overrides = {name: value for name, value in self.model.items() if name != "model_type"}
        return {"model_type": self.model["model_type"], "config_overrides": overrides, "sharing": self.sharing}

    def new_model(self) -> PreTrainedModel:
        """Return the model with random weights.

        Raises:
            ValueError: an unknown or invalid field, or sharing that it cannot do.
        """
        try:
            arguments = ModelArguments(**self.arguments, tokenizer_vocab_size=1)
            return make_model(new_config(config_fields(arguments)), sharing=self.sharing)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise ValueError(f"variant {self.name}: {error}") from error

    def cost(self, sequence_length: int, predicted_share: float) -> Cost:
        """See `cost_of`; a network that makes coefficients counts as these, which replace it after training."""
        model, sharing = (
            {**part, "coefficient_source": "direct"} if "coefficient_source" in part else part
            for part in (self.model, self.sharing)
        )
        counted = replace(self, model=model, sharing=sharing)
        # `share` reads weights; all other models can be counted without any.
        with nullcontext() if sharing else torch.device("meta"):
            return cost_of(counted.new_model(), sequence_length, predicted_share)


def non_embedding(cost: Cost) -> int:
    """Return the parameters outside the embeddings, and so those of a head that is not tied to them."""
    return cost.total - cost.parameters["embeddings"]


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
        ValueError: an unknown key or one of the wrong type; no variants, or two of one name; a model that cannot be
            made; a narrower model that cannot be found, or invalid options.
    """

    def __init__(self, path: str | Path, **changes):
        self.path = Path(os.path.relpath(path))  # the tables name it, whatever way it was given
        try:
            self._read(read_part(File, {**load_file(path), **changes}, "the file"))
        except (ValueError, StrictDataclassError) as error:
            raise ValueError(f"{path}: {error}") from error

    def _read(self, file: File):
        self.training = {**_DEFAULTS, **file.training}
        self.seeds = file.seeds
        self.notes = file.notes.strip()  # for a reader of the results
        self.output_dir = Path(file.output_dir or f"runs/comparisons/{self.path.stem}")
        self.results_dir = Path(file.results_dir or self.output_dir / "results")
        self._check_training()
        self.model = {**({} if "vocab_size" in file.model else {"vocab_size": self._vocab_size()}), **file.model}
        self.sweep = None if file.sweep is None else read_part(Sweep, file.sweep, "sweep")
        if self.sweep is not None and (self.sweep.seed in self.seeds or not 0 <= self.sweep.seed <= MAX_SEED):
            raise ValueError(
                f"sweep: seed={self.sweep.seed} must be from 0 to {MAX_SEED}, and none of those that are reported"
            )
        self.variants = [self._read_variant(stated) for stated in file.variants]
        self.baseline = self.variants[0].name if file.baseline is None else file.baseline
        if self.baseline not in (names := [variant.name for variant in self.variants]):
            raise ValueError(f"baseline={self.baseline!r} is none of the variants {', '.join(names)}")
        self.costs = {variant.name: self._cost(variant) for variant in self.variants}
        # The narrower standard model of each reduced variant, by name.
        self.narrow_of: dict[str, str] = {}
        if file.narrow:
            self._add_narrower()
        self._check_names()
        self._read_evaluation(file.evaluation)
        self.claims = [self._read_claim(stated) for stated in file.claims]
        for variant in self.variants:
            model_args, *others = self.arguments_of(Run(variant, self.seeds[0]), {}, self.output_dir, self.output_dir)
            check_pretraining(config_fields(model_args), model_args, *others)

    @property
    def settings(self) -> dict[str, Any]:
        """What all records of a comparison must agree in."""
        sweep = vars(self.sweep) if self.sweep else {}
        return {"training": self.training, "sweep": sweep, "evaluation": self._stated_evaluation}

    @property
    def objective(self) -> str:
        """ "mlm" or "clm"."""
        return pretraining_objective(self.model["model_type"])

    @property
    def tokens_per_step(self) -> int:
        _, data_args, training_args = self.arguments
        rows = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
        return rows * data_args.block_size

    @cached_property
    def arguments(self) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
        """The arguments of pre-training that all runs have in common."""
        return self._parse({})

    def arguments_of(self, run: Run, tuned: dict[str, float], folder: Path, tokenizer: Path):
        """Return the arguments of `pretrain` for a run.

        Args:
            tuned: what a sweep has chosen for its variant.
        """
        if run.tuned:
            tuned = dict(run.tuned)
            if self.sweep.max_steps is not None:
                tuned["max_steps"] = self.sweep.max_steps
        model_args, data_args, training_args = self._parse({**run.variant.training, **tuned})
        model_args = replace(
            model_args, **run.variant.arguments, tokenizer_name=str(tokenizer), tokenizer_vocab_size=None
        )
        return model_args, data_args, replace(training_args, output_dir=str(folder), seed=run.seed)

    def tokens_of(self, run: Run) -> int:
        """Return how many tokens a run is trained on."""
        of_sweep = self.sweep.max_steps if run.tuned else None
        return self.tokens_per_step * (of_sweep or self.arguments[2].max_steps)

    def flops_of(self, run: Run) -> float:
        """Return the floating-point operations of a run's training."""
        return 3 * self.costs[run.variant.name].forward_flops * self.tokens_of(run)

    def runs(self) -> list[Run]:
        """Return all runs in order: the sweep's, then every variant with the first seed, then with the next."""
        swept = []
        if self.sweep is not None:
            values = [[(name, value) for value in values] for name, values in self.sweep.tried.items()]
            swept = [Run(variant, self.sweep.seed, tuned) for tuned in product(*values) for variant in self.variants]
        return swept + [Run(variant, seed) for seed in self.seeds for variant in self.variants]

    def finetuning(self, model: str, seed: int) -> tuple[GlueArguments, FinetuningArguments]:
        """Return the arguments of fine-tuning a model on the tasks of the evaluation.

        Args:
            model: its folder, in which the results go to "glue".
        """
        stated = {"report_to": "none", "use_cpu": self.arguments[2].use_cpu, **self.glue}
        stated |= {"output_dir": f"{model}/glue", "seeds": str(seed)}
        return parse_mapping(stated, (GlueArguments, FinetuningArguments), "evaluation: glue", ["--model", model])

    def check_files(self):
        """Raise a ValueError if a file or folder that the evaluation reads is not there."""
        files = [*(self.texts.files.values() if self.texts else ()), *([self.blimp.pairs] if self.blimp else ())]
        for name in files:
            if not Path(name).is_file():
                raise ValueError(f"{self.path}: evaluation: {name} is not a file")
        if (folder := self.glue.get("data_dir")) and not Path(folder).is_dir():
            raise ValueError(f"{self.path}: evaluation: data_dir={folder} is not a folder")

    def _parse(self, changes: dict[str, Any]) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
        options = {**self.training, "model_type": "shared_bert", "output_dir": str(self.output_dir), **changes}
        # A GPU's records are drawn anywhere, but TrainingArguments refuses bf16 without a GPU, unless it is told.
        options["use_cpu"] = options.get("use_cpu", False) or not torch.cuda.is_available()
        return parse_mapping(options, (ModelArguments, DataArguments, PretrainingArguments), "training")

    def _check_training(self):
        of_model = {f.name for f in fields(ModelArguments)} - {*_OF_TOKENIZER, "attn_implementation"}
        for name in self.training:
            if name in _NOT_OF_A_COMPARISON | of_model:
                raise ValueError(f"training: {name} is not an option of a comparison's runs")
        _, _, training_args = self.arguments
        if training_args.max_steps <= 0:
            raise ValueError("training: give max_steps, so that all variants read as many tokens")

    def _vocab_size(self) -> int:
        model_args, _, _ = self.arguments
        return padded_vocab_size(model_args.tokenizer_vocab_size or len(load_tokenizer(model_args.tokenizer_name)))

    def _read_variant(self, stated: Any) -> Variant:
        if not isinstance(stated, dict) or not re.fullmatch(r"[\w.+-]+", name := str(stated.get("name", ""))):
            raise ValueError(f"variants: {stated} needs a name of letters, digits, _, -, . and +")
        parts = {"sharing": {}, "training": {}}
        for key in parts:
            parts[key] = stated.get(key, {})
            if not isinstance(parts[key], dict):
                raise ValueError(f"variant {name}: {key}={parts[key]!r} must be keys and values")
        swept = self.sweep.tried if self.sweep else {}
        check_keys(parts["training"], _OF_VARIANT - swept.keys(), f"variant {name}: training")
        self._parse(parts["training"])
        apart = {"name", "published", *parts}
        model = {**self.model, **{key: value for key, value in stated.items() if key not in apart}}
        objectives = [pretraining_objective(str(of["model_type"])) for of in (self.model, model)]
        if objectives[0] != objectives[1]:
            raise ValueError(
                f"variant {name}: a {model['model_type']} is not trained as a {self.model['model_type']} is"
            )
        published = str(stated.get("published", ""))
        return Variant(name, model, parts["sharing"], parts["training"], published)

    def _check_names(self):
        names = Counter(variant.name for variant in self.variants)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"variants: there are two of the name {twice[0]!r}")

    def _cost(self, variant: Variant) -> Cost:
        _, data_args, _ = self.arguments
        share = data_args.mlm_probability if self.objective == "mlm" else 1.0
        return variant.cost(data_args.block_size, share)

    def _add_narrower(self):
        standard = next(variant for variant in self.variants if variant.name == self.baseline)
        with torch.device("meta"):
            config = replace(standard, sharing={}).new_model().config
        # A config of transformers has neither field.
        found = getattr(config, "attention_scheme", "standard"), getattr(config, "depth_sharing", "none")
        if standard.sharing or found != ("standard", "none"):
            raise ValueError(
                f"the baseline {self.baseline} shares weights itself: choose a standard one for narrower models, or "
                "give narrow: false"
            )
        widths = {name: value for name in WIDTHS if isinstance(value := getattr(config, name, None), int)}

        @cache
        def counted(hidden_size: int, intermediate_size: int) -> int:
            model = {**standard.model, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
            return non_embedding(replace(standard, model=model).cost(1, 1.0))

        def count(model: dict[str, Any]) -> int:
            return counted(model["hidden_size"], model["intermediate_size"])

        whole, narrower = non_embedding(self.costs[self.baseline]), {}
        for variant in self.variants:
            wanted = non_embedding(self.costs[variant.name])
            if wanted > 0.99 * whole:
                continue
            near = [name for name in narrower if abs(non_embedding(self.costs[name]) - wanted) <= 0.01 * wanted]
            if near:
                self.narrow_of[variant.name] = near[0]
                continue
            try:
                model = narrower_fields({**standard.model, **widths}, wanted, count)
            except ValueError as error:
                raise ValueError(f"beside {variant.name}: {error}") from error
            name = f"narrow_{model['hidden_size']}x{model['intermediate_size']}"
            narrower[name] = replace(standard, name=name, model=model, published="")
            self.costs[name] = self._cost(narrower[name])
            self.narrow_of[variant.name] = name
        self.variants += narrower.values()

    def _read_evaluation(self, stated: dict[str, Any]):
        kinds = {"texts": Texts, "blimp": Blimp, "noise": Noise}
        check_keys(stated, [*kinds, "glue"], "evaluation")
        found = {
            kind: read_part(cls, stated[kind], f"evaluation: {kind}") if kind in stated else None
            for kind, cls in kinds.items()
        }
        self.texts, self.blimp, self.noise = found.values()
        self._stated_evaluation = stated
        self.glue = stated.get("glue", {})
        if not isinstance(self.glue, dict):
            raise ValueError(f"evaluation: glue={self.glue!r} must be keys and values")
        tasks = self.finetuning("any", 0)[0].task_names if self.glue else []
        if self.noise is not None:
            if self.noise.task not in tasks:
                raise ValueError(f"evaluation: noise needs task={self.noise.task} among the tasks of glue")
            if glue_task(self.noise.task).labels is None:
                raise ValueError(f"evaluation: noise: {self.noise.task} has no classes")
        self.measured = [f"loss:{name}" for name in self.texts.files] if self.texts else ["loss"]
        self.measured += ["blimp"] if self.blimp else []
        self.measured += [f"glue:{task}" for task in tasks] + (["glue"] if len(tasks) > 1 else [])
        self.measured += ["noise"] if self.noise else []

    def _read_claim(self, stated: Any) -> Claim:
        claim = read_part(Claim, stated, "claims")
        of = [*self.narrow_of] if claim.of == "reduced" else [claim.of] if isinstance(claim.of, str) else claim.of
        where, known = f"claims: {claim.claim!r}", [variant.name for variant in self.variants]
        if not of:
            raise ValueError(f"{where} is of no variant")
        for name in of:
            against = self.narrow_of.get(name) if claim.against == "narrow" else claim.against
            if name not in known or against not in known or name == against:
                raise ValueError(f"{where}: {name!r} cannot be held against {claim.against!r}")
        if claim.measure not in self.measured:
            raise ValueError(f"{where}: {claim.measure!r} is not measured, only {', '.join(self.measured)}")
        return replace(claim, of=of)
