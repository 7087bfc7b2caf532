r"""Converts saved models, between stock BERT or GPT-2 and the models of this package.

python scripts/convert.py to-stock FOLDER OUTPUT
python scripts/convert.py from-stock MODEL OUTPUT --attention_scheme shared_kv
python scripts/convert.py from-stock MODEL OUTPUT --depth_sharing masa --num_atoms 4 --calibration python-docs \
    --heal --dataset_name python-docs --max_steps 1000
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, PreTrainedModel

import shared_bert
from shared_bert.command_line import reports_user_errors
from shared_bert.conversion.families import SHARED_CLASSES, STOCK_CLASSES
from shared_bert.data import calibration_batches, load_documents, load_tokenizer
from shared_bert.data.sources import FORMATS
from shared_bert.folders import check_free, copy_tokenizer, load_model, whole_folder
from shared_bert.modeling.configuration_shared_attention import DEPTH_SHARING
from shared_bert.training import DataArguments, PretrainingArguments, heal
from shared_bert.training.checkpoints import finished_checkpoints
from shared_bert.training.healing import check_healing
from shared_bert.training.text import pack_documents, read_documents

SOURCES = (*SHARED_CLASSES, *STOCK_CLASSES)
CONFIG_FIELDS = {
    "num_atoms": "matrices in each dictionary of masa",
    "num_groups": "groups of layers of sequential and repeat_all_over",
    "rank": "of low_rank; with the others, of what each layer adds to its shared matrices",
    "num_key_value_heads": "fewer heads for key and value",
}
CALIBRATION_TOKENS = 65536
# Options of healing that say how calibration text is read, too.
CALIBRATION_OPTIONS = {
    "dataset_config_name", "text_column", "sample_by", "streaming", "max_train_samples", "block_size", "seed",
}  # fmt: skip


class Parser(HfArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message):
        raise ValueError(message)


def convert_to_stock(arguments: argparse.Namespace):
    check_free(arguments.output)
    model = load_model(arguments.model, STOCK_CLASSES)
    stock = shared_bert.to_stock(model)
    with whole_folder(arguments.output) as folder:
        stock.save_pretrained(folder)
        copy_tokenizer(arguments.model, folder)
    print(
        f"{type(model).__name__} of {model.num_parameters():,} parameters is now a {type(stock).__name__} of "
        f"{stock.num_parameters():,} in {arguments.output}"
    )


def convert_from_stock(arguments: argparse.Namespace):
    if arguments.heal:
        convert_and_heal(arguments)
        return
    for name in arguments.given_of_healing:
        if not (arguments.calibration and name in CALIBRATION_OPTIONS):
            raise ValueError(f"--{name} goes with --heal" + " or --calibration" * (name in CALIBRATION_OPTIONS))
    check_free(arguments.output)
    write_converted(load_model(arguments.model, SOURCES), arguments, arguments.output)


def convert_and_heal(arguments: argparse.Namespace):
    arguments.output_dir = arguments.output
    data_args, training_args = (
        dataclass(**{field.name: getattr(arguments, field.name) for field in fields(dataclass) if field.init})
        for dataclass in (DataArguments, PretrainingArguments)
    )
    converted = Path(arguments.output, "converted")
    goes_on = str(training_args.resume_from_checkpoint or False).lower() != "false"
    if training_args.process_index == 0 and not goes_on:
        check_free(arguments.output)
    teacher = load_model(arguments.model, SOURCES).float()
    tokenizer = load_tokenizer(arguments.model)
    check_healing(teacher, tokenizer, data_args, training_args)
    # The first process converts, the others find the result; what is wrong with the text shows before.
    with training_args.main_process_first(local=False, desc="converting the model"):
        pack_documents(read_documents(data_args, training_args.seed), tokenizer, data_args)
        if training_args.process_index == 0 and not (goes_on and converted.exists()):
            write_converted(teacher, arguments, converted)
    recorded = json.loads((converted / "conversion.json").read_text())["options"]
    for name, value in conversion_options(arguments).items():
        if recorded[name] != value:
            raise ValueError(
                f"{converted} was made with {name}={recorded[name]!r}, not {value!r}: name another folder"
            )
    if goes_on and not finished_checkpoints(arguments.output):
        training_args.resume_from_checkpoint = None  # stopped before the first checkpoint
    student = load_model(str(converted), STOCK_CLASSES)
    heal(student, teacher, tokenizer, data_args, training_args, save_more=partial(copy_tokenizer, arguments.model))


def write_converted(model: PreTrainedModel, arguments: argparse.Namespace, output: str | Path):
    options = conversion_options(arguments)
    asked = {name: value for name, value in options.items() if value is not None}
    for name in ("calibration", "calibration_tokens"):
        asked.pop(name, None)
    calibration = read_calibration(arguments, model) if arguments.calibration else None
    converted, report = shared_bert.from_stock(model, calibration=calibration, **asked)
    print(report, flush=True)
    with whole_folder(output) as folder:
        converted.save_pretrained(folder)
        copy_tokenizer(arguments.model, folder)
        record = {"model": arguments.model, "options": options, "report": report.to_dict()}
        (folder / "conversion.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"the converted model is in {output}", flush=True)


def conversion_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("attention_scheme", "depth_sharing", "depth_shared_matrices", *CONFIG_FIELDS, "dictionary_groups")
    options = {name: getattr(arguments, name) for name in (*names, "spread_rank", "calibration", "calibration_tokens")}
    return {**options, "align": not arguments.no_align}


def read_calibration(arguments: argparse.Namespace, model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Reads the text when the first batch is asked for, which is after the other options have been checked."""
    most = model.config.max_position_embeddings
    if arguments.block_size > most:
        raise ValueError(f"block_size={arguments.block_size} is more than max_position_embeddings={most}")
    source = arguments.calibration
    is_file = Path(source).exists() or "*" in source or Path(source).suffix in FORMATS
    # The file is its own validation text, so that nothing is split off.
    origin = {"train_file": source, "validation_file": source} if is_file else {"dataset_name": source}
    same = CALIBRATION_OPTIONS - {"block_size"}
    documents = load_documents(**origin, **{name: getattr(arguments, name) for name in same})["train"]
    tokenizer = load_tokenizer(arguments.model)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model vocab_size={model.config.vocab_size}")
    num_tokens = CALIBRATION_TOKENS if arguments.calibration_tokens is None else arguments.calibration_tokens
    try:
        yield from calibration_batches(documents, tokenizer, num_tokens, arguments.block_size)
    except ValueError as error:
        raise ValueError(f"calibration text {source}: {error}") from error


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("to-stock", help="multiply a model of this package out into plain BERT or GPT-2")
    command.set_defaults(run=convert_to_stock)
    command.add_argument("model", help="a saved model of this package: a folder, or a name on the Hub")
    command.add_argument("output", help="the folder to write; it must be missing or empty")

    healing = (DataArguments, PretrainingArguments)
    command = commands.add_parser(
        "from-stock",
        help="convert BERT, GPT-2 or a model of this package to another scheme and depth sharing",
        usage="%(prog)s MODEL OUTPUT [--option value ...]",
        dataclass_types=healing,
        allow_abbrev=False,
    )
    command.set_defaults(run=convert_from_stock)
    command.add_argument("model", help="a folder, or a name on the Hub")
    command.add_argument("output", help="the folder to write; it must be missing or empty")
    group = command.add_argument_group("conversion")
    group.add_argument("--attention_scheme", choices=shared_bert.SCHEMES, default="standard")
    group.add_argument("--depth_sharing", choices=DEPTH_SHARING, default="none")
    group.add_argument("--depth_shared_matrices", choices=["qkv", "qkvo"], default="qkv")
    for name, text in CONFIG_FIELDS.items():
        group.add_argument(f"--{name}", type=int, help=text)
    group.add_argument("--dictionary_groups", type=int, default=1, help="split the dictionary of masa in so many")
    group.add_argument("--spread_rank", action="store_true", help="spread the rank over the matrices that need it")
    group.add_argument("--no_align", action="store_true", help="do not turn and reorder heads before they are shared")
    group.add_argument("--calibration", metavar="SOURCE", help="text to fit to: a file, or a data set's name")
    group.add_argument("--calibration_tokens", type=int, help=f"how much of it (default: {CALIBRATION_TOKENS})")
    group.add_argument("--heal", action="store_true", help="train the result to do as the original, on the text below")

    parsed = parser.parse_args(arguments)
    if parsed.run is convert_from_stock:
        if parsed.output_dir is not None:
            raise ValueError("--output_dir: name the folder as OUTPUT only")
        if parsed.calibration_tokens is not None and parsed.calibration is None:
            raise ValueError("--calibration_tokens goes with --calibration")
        if parsed.overwrite_output_dir:
            raise ValueError("--overwrite_output_dir: conversions replace nothing; name another folder")
        given = [word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")]
        of_healing = {field.name for dataclass in healing for field in fields(dataclass)}
        parsed.given_of_healing = [name for name in given if name in of_healing]
    return parsed


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    # Python would stop at once; like this, what is half written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
