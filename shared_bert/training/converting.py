"""Converting a saved model into a folder, and healing it there."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..conversion import ConversionReport, from_stock
from ..conversion.families import SHARED_CLASSES, STOCK_CLASSES
from ..data import calibration_batches, load_tokenizer
from ..data.sources import FORMATS
from ..folders import check_free, copy_tokenizer, load_any_model, load_sharing_model, whole_folder
from ..injection import SharingReport, share
from .arguments import ConversionArguments, DataArguments, PretrainingArguments
from .checkpoints import finished_checkpoints
from .healing import check_healing, heal
from .models import check_length, check_vocabulary
from .text import pack_documents, read_documents

SOURCES = (*SHARED_CLASSES, *STOCK_CLASSES)
_CALIBRATION_TOKENS = 65536


def convert(
    name_or_path: str, output: str | Path, conversion: ConversionArguments, data_args: DataArguments, seed: int = 42
):
    """Convert a saved model and write it with its tokenizer and `conversion.json`.

    BERT, GPT-2 and the models of this package are converted by `from_stock`; other architectures, and these if
    `targets` are given, by `share`.

    Args:
        name_or_path: a folder, or a name on the Hub.
        output: a folder that is missing or empty.
        data_args: how calibration text is read.

    Raises:
        ValueError: see `from_stock`; an unusable model, folder or text. Nothing is written.
        OSError: the model is missing, or the disk is full.
    """
    check_free(output)
    _write_converted(load_any_model(name_or_path), name_or_path, output, conversion, data_args, seed)


def convert_and_heal(
    name_or_path: str, conversion: ConversionArguments, data_args: DataArguments, training_args: PretrainingArguments
) -> dict[str, float]:
    """Convert a saved model into `output_dir/converted`, and heal it into `output_dir` (see `heal`).

    With `resume_from_checkpoint`, a run that was stopped continues, and its conversion is not repeated.

    Returns, raises: as `heal` and `convert`; a ValueError if the folder holds another conversion.
    """
    output = training_args.output_dir
    converted = Path(output, "converted")
    resumes = str(training_args.resume_from_checkpoint or False).lower() != "false"
    if training_args.process_index == 0 and not resumes:
        check_free(output)
    teacher = load_any_model(name_or_path).to(torch.float32)  # models that share refuse `float()`
    tokenizer = load_tokenizer(name_or_path)
    check_healing(teacher, tokenizer, data_args, training_args)
    # The first process converts, the others find the result. The text is packed first, since it may be unusable.
    with training_args.main_process_first(local=False, desc="converting the model"):
        pack_documents(read_documents(data_args, training_args.seed), tokenizer, data_args)
        if training_args.process_index == 0 and not (resumes and converted.exists()):
            _write_converted(teacher, name_or_path, converted, conversion, data_args, training_args.seed)
    recorded = json.loads((converted / "conversion.json").read_text())["options"]
    for name, value in asdict(conversion).items():
        if recorded[name] != value:
            raise ValueError(
                f"{converted} was made with {name}={recorded[name]!r}, not {value!r}: name another folder"
            )
    if resumes and not finished_checkpoints(output):
        training_args.resume_from_checkpoint = None  # stopped before the first checkpoint
    student = load_sharing_model(str(converted))
    return heal(student, teacher, tokenizer, data_args, training_args, save_more=partial(copy_tokenizer, name_or_path))


def _write_converted(
    model: PreTrainedModel,
    name_or_path: str,
    output: str | Path,
    conversion: ConversionArguments,
    data_args: DataArguments,
    seed: int,
):
    options = asdict(conversion)
    text = _read_calibration(model, name_or_path, conversion, data_args, seed) if conversion.calibration else None
    converted, report = _convert(model, conversion, text)
    print(report, flush=True)
    with whole_folder(output) as folder:
        converted.save_pretrained(folder)
        copy_tokenizer(name_or_path, folder)
        record = {"model": name_or_path, "options": options, "report": report.to_dict()}
        (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"the converted model is in {output}", flush=True)


def _convert(
    model: PreTrainedModel, conversion: ConversionArguments, text: Iterator[dict[str, torch.Tensor]] | None
) -> tuple[PreTrainedModel, ConversionReport | SharingReport]:
    options = asdict(conversion)
    targets = options.pop("targets")
    wanted = {name: value for name, value in options.items() if value is not None and not name.startswith("calibr")}
    if type(model) in SOURCES and targets is None:
        return from_stock(model, calibration=text, **wanted)
    if "num_key_value_heads" in wanted:
        raise ValueError(f"num_key_value_heads={wanted['num_key_value_heads']} goes with BERT and GPT-2 only")
    return share(model, targets=targets.split(",") if targets else None, calibration=text, **wanted)


def _read_calibration(
    model: PreTrainedModel, name_or_path: str, conversion: ConversionArguments, data_args: DataArguments, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of calibration text; it is read when the first is taken, after all options have been checked."""
    check_length(model.config, "block_size", data_args.block_size)
    source = conversion.calibration
    is_file = Path(source).exists() or "*" in source or Path(source).suffix in FORMATS
    file, dataset = (source, None) if is_file else (None, source)
    changes = {"train_file": file, "validation_file": None, "dataset_name": dataset, "validation_split": None}
    documents = read_documents(data_args, seed, **changes)["train"]
    tokenizer = load_tokenizer(name_or_path)
    check_vocabulary(model.config, tokenizer)
    num_tokens = conversion.calibration_tokens
    num_tokens = _CALIBRATION_TOKENS if num_tokens is None else num_tokens
    try:
        yield from calibration_batches(documents, tokenizer, num_tokens, data_args.block_size)
    except ValueError as error:
        raise ValueError(f"calibration text {source}: {error}") from error
