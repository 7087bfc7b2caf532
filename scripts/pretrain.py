"""Pre-train a model: `python scripts/pretrain.py configs/pretrain/RECIPE.yaml [--option value ...]`.

Several processes: `accelerate launch --config_file configs/accelerate/FILE.yaml scripts/pretrain.py RECIPE.yaml`.
"""

import sys

from shared_bert.command_line import reports_user_errors
from shared_bert.training import parse_recipe, pretrain


@reports_user_errors
def main(arguments: list[str]):
    pretrain(*parse_recipe(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
