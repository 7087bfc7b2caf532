"""Image classifiers that share weights, trained from scratch with several seeds."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    ViTImageProcessor,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from ..data.images import ImageCollator, Images, load_images
from ..injection import share
from ..training.arguments import RunArguments, SharingArguments, option, read_overrides
from ..training.finetuning import evaluations
from ..training.run import run_training, starting_checkpoint
from ..training.trainer import SafeTrainer
from ..training.yaml_files import check_keys, load_mapping
from .efficiency import environment
from .records import (
    SeededArguments,
    check_settings,
    load_records,
    record_path,
    run_settings,
    save_record,
    write_scores,
)

# What tells the models of one comparison apart.
_OF_MODEL = ("config_name", "config_overrides", "targets", *SharingArguments.__dataclass_fields__)


@dataclass(kw_only=True)
class ImageArguments(SeededArguments, SharingArguments):
    """The images, and the model that is trained on them.

    Raises:
        ValueError: see `SeededArguments`; no images or no config_name.
    """

    images: str | None = option(None, "A folder of images, a folder with MNIST's files, or a data set on the Hub.")
    image_column: str | None = option(None, "Of the Hub's data set; else the first of its kind.")
    label_column: str | None = option(None, "Of the Hub's data set; else the first of its kind.")
    config_name: str | None = option(None, "A YAML or JSON file of the model_type and of config fields.")
    targets: str | None = option(None, "Matrices that layers share, separated by commas; else attention's.")
    flip: bool = option(False, "Mirror half of the training images.")
    shift: bool = option(False, "Move training images by up to two pixels.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("images", "config_name"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not given")

    def make_model(self, images: Images) -> PreTrainedModel:
        """Return a new model for images of this size and these classes.

        Raises:
            ValueError: an unknown model type or field, invalid values, or sharing that it cannot do.
        """
        stated = load_mapping(self.config_name)
        model_type = stated.pop("model_type", None)
        try:
            config_class = type(AutoConfig.for_model(model_type))
        except ValueError as error:
            raise ValueError(f"model_type={model_type!r} of {self.config_name} is not one of transformers") from error
        overrides = read_overrides(self.config_overrides or "")
        valid = set(config_class.__dataclass_fields__)
        check_keys(stated, valid, self.config_name)
        check_keys(overrides, valid, "config_overrides")
        _, channels, height, width = images.pixels.shape
        shape = {"image_size": height if height == width else [height, width], "num_channels": channels}
        names = dict(enumerate(images.names))
        labels = {"id2label": names, "label2id": {name: label for label, name in names.items()}}
        model = AutoModelForImageClassification.from_config(config_class(**{**stated, **shape, **labels, **overrides}))
        sharing = {name: getattr(self, name) for name in SharingArguments.__dataclass_fields__}
        if (sharing["attention_scheme"], sharing["depth_sharing"]) == ("standard", "none"):
            return model
        sharing = {name: value for name, value in sharing.items() if value is not None}
        targets = self.targets.split(",") if self.targets else None
        return share(model, targets=targets, initialize=True, **sharing)[0]


@dataclass
class ImageTrainingArguments(RunArguments):
    """`TrainingArguments` with defaults for training on images."""

    learning_rate: float = option(1e-3, "The peak learning rate.")
    weight_decay: float = option(0.05, "Decay of tensors of two or more dimensions.")
    warmup_steps: float = option(0.1, "Steps of warm-up, or below 1 their share of all steps.")
    lr_scheduler_type: str = option("cosine", "How the learning rate falls.")
    per_device_train_batch_size: int = option(128, "Images per device and step.")
    per_device_eval_batch_size: int = option(256, "Images per device in evaluation.")
    eval_strategy: str = option("epoch", "When to evaluate: no, steps or epoch.")
    save_strategy: str = option("no", "When to save checkpoints: no, steps or epoch.")
    logging_strategy: str = option("epoch", "When to log: no, steps or epoch.")


def run_images(arguments: ImageArguments, training_args: ImageTrainingArguments) -> list[dict[str, Any]]:
    """Train with all seeds, and write records, a table and a plot into `output_dir`.

    Seeds whose record is there already are skipped, so an interrupted command continues.

    Returns:
        The records of all runs.

    Raises:
        ValueError: invalid arguments or images, or results of other settings in `output_dir`, before any training.
    """
    output = Path(training_args.output_dir)
    images = load_images(arguments.images, arguments.image_column, arguments.label_column)
    parts = {
        "train": images["train"].first(arguments.max_train_samples),
        "test": images["test"].first(arguments.max_eval_samples),
    }
    arguments.make_model(parts["train"])  # an error should come now
    settings = run_settings(arguments, training_args)
    # Settings other than the model must be the same in a comparison.
    settings["model"] = {name: settings.pop(name) for name in _OF_MODEL}
    check_settings(output, settings)
    for seed in arguments.seed_numbers:
        path = record_path(output, Path(arguments.images).name, seed)
        if path.exists():
            continue
        record = _run(seed, parts, arguments, training_args)
        if training_args.process_index == 0:
            save_record(path, {**record, "settings": settings})
            print(f"seed {seed}: accuracy {record['score']:.4f}", flush=True)
    records = load_records(output)
    if training_args.process_index == 0:
        write_scores({output.name: records}, output / "results")
    return records


def _run(
    seed: int, parts: dict[str, Images], arguments: ImageArguments, training_args: ImageTrainingArguments
) -> dict[str, Any]:
    folder = Path(training_args.output_dir, f"seed-{seed}")
    args = replace(training_args, output_dir=str(folder), seed=seed, overwrite_output_dir=True)
    checkpoint = starting_checkpoint(args)
    set_seed(seed)
    model = arguments.make_model(parts["train"])
    mean, std = parts["train"].statistics()
    collators = ImageCollator(mean, std, arguments.flip, arguments.shift), ImageCollator(mean, std)
    height, width = parts["train"].pixels.shape[-2:]
    processor = ViTImageProcessor(
        size={"height": height, "width": width},
        image_mean=mean.tolist(),
        image_std=std.tolist(),
        do_convert_rgb=len(mean) == 3,
    )
    trainer = ImageTrainer(
        *collators,
        model=model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        save_more=processor.save_pretrained,
    )
    trainer.remove_callback(PrinterCallback)
    metrics = run_training(trainer, checkpoint, "training", {"dataset_name": arguments.images}, loss_name="loss")
    epochs = evaluations(trainer.state.log_history)
    return {
        "model": arguments.config_name,
        "task": Path(arguments.images).name,
        "seed": seed,
        "epoch": "last",
        "metric": "accuracy",
        "score": epochs[-1]["eval_accuracy"],
        "metrics": {"accuracy": epochs[-1]["eval_accuracy"]},
        "epochs": epochs,
        "parameters": model.num_parameters(),
        "train_seconds": metrics["train_runtime"],
        "rows": {split: len(part) for split, part in parts.items()},
        **environment(args.device.type),
    }


class ImageTrainer(SafeTrainer):
    """`SafeTrainer` that changes the images at random in training only.

    Args:
        train_collator, eval_collator: make batches of images.
    """

    def __init__(self, train_collator: ImageCollator, eval_collator: ImageCollator, **kwargs):
        super().__init__(data_collator=train_collator, compute_metrics=_accuracy, **kwargs)
        self.eval_collator = eval_collator

    def get_eval_dataloader(self, eval_dataset=None) -> torch.utils.data.DataLoader:
        train_collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float(np.mean(logits.argmax(-1) == prediction.label_ids))}
