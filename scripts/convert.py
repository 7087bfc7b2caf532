r"""Convert saved models: stock ones to models that share weights, and these to stock ones.

python scripts/convert.py to-stock MODEL OUTPUT
python scripts/convert.py from-stock MODEL OUTPUT --attention_scheme shared_kv
python scripts/convert.py from-stock MODEL OUTPUT --depth_sharing masa --num_atoms 4 --calibration python-docs \
    --heal --dataset_name python-docs --max_steps 1000

MODEL is a folder or a name on the Hub; OUTPUT must be missing or empty. BERT and GPT-2 become models of this package;
other architectures stay what they are, and share inside.
"""

import argparse
import signal
import sys
from dataclasses import fields

import shared_bert
from shared_bert.command_line import RaisingParser, reports_user_errors
from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.folders import check_free, copy_tokenizer, load_sharing_model, whole_folder
from shared_bert.training import ConversionArguments, DataArguments, PretrainingArguments, convert, convert_and_heal

# Options of healing that say how calibration text is read, too.
CALIBRATION_OPTIONS = {
    "dataset_config_name", "text_column", "sample_by", "streaming", "max_train_samples", "block_size", "seed",
}  # fmt: skip


def to_stock(arguments: argparse.Namespace):
    check_free(arguments.output)
    model = load_sharing_model(arguments.model)
    parameters = model.num_parameters()
    stock = shared_bert.to_stock(model) if type(model) in STOCK_CLASSES else model.dequantize()
    with whole_folder(arguments.output) as folder:
        stock.save_pretrained(folder)
        copy_tokenizer(arguments.model, folder)
    print(
        f"{type(model).__name__} of {parameters:,} parameters is now a {type(stock).__name__} of "
        f"{stock.num_parameters():,} in {arguments.output}"
    )


def from_stock(arguments: argparse.Namespace):
    conversion, data_args, training_args = arguments.parser.parse_dict(vars(arguments), allow_extra_keys=True)
    if arguments.heal:
        convert_and_heal(arguments.model, conversion, data_args, training_args)
    else:
        convert(arguments.model, arguments.output, conversion, data_args, training_args.seed)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = RaisingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("to-stock", help="multiply a model out into the stock one of the same outputs")
    command.set_defaults(run=to_stock)
    command.add_argument("model")
    command.add_argument("output")

    healing = (DataArguments, PretrainingArguments)
    command = commands.add_parser(
        "from-stock",
        help="convert a model to another scheme and depth sharing",
        usage="%(prog)s MODEL OUTPUT [--option value ...]",
        dataclass_types=(ConversionArguments, *healing),
        allow_abbrev=False,
    )
    command.set_defaults(run=from_stock, parser=command)
    command.add_argument("model")
    command.add_argument("output")
    command.add_argument("--heal", action="store_true", help="train the result to reproduce the original's outputs")
    parsed = parser.parse_args(arguments)
    if parsed.run is from_stock:
        _check(parsed, arguments, {field.name for dataclass in healing for field in fields(dataclass)})
        parsed.output_dir = parsed.output
    return parsed


def _check(parsed: argparse.Namespace, arguments: list[str], of_healing: set[str]):
    if parsed.output_dir is not None:
        raise ValueError("--output_dir: name the folder as OUTPUT only")
    if parsed.overwrite_output_dir:
        raise ValueError("--overwrite_output_dir: conversions replace nothing; name another folder")
    for name in (word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")):
        of_calibration = name in CALIBRATION_OPTIONS
        if name in of_healing and not parsed.heal and not (parsed.calibration and of_calibration):
            raise ValueError(f"--{name} goes with --heal{' or --calibration' if of_calibration else ''}")


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    # Python would stop at once; like this, what is half written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
