"""Converts saved models.

python scripts/convert.py to-stock FOLDER OUTPUT      # a model of this package to plain BERT or GPT-2
"""

import argparse
import sys

from shared_bert import to_stock
from shared_bert.conversion.folders import check_free, copy_tokenizer, load_model, whole_folder
from shared_bert.conversion.stock import STOCK_CLASSES


def convert_to_stock(arguments: argparse.Namespace):
    check_free(arguments.output)
    model = load_model(arguments.folder, STOCK_CLASSES)
    stock = to_stock(model)
    with whole_folder(arguments.output) as folder:
        stock.save_pretrained(folder)
        copy_tokenizer(arguments.folder, folder)
    print(
        f"{type(model).__name__} of {model.num_parameters():,} parameters is now a {type(stock).__name__} of "
        f"{stock.num_parameters():,} in {arguments.output}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("to-stock", help="multiply a model of this package out into plain BERT or GPT-2")
    command.add_argument("folder", help="a saved model of this package: a folder, or a name on the Hub")
    command.add_argument("output", help="the folder to write; it must be missing or empty")
    command.set_defaults(run=convert_to_stock)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    parsed = parse(arguments)
    try:
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        print("convert.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
