"""Pre-train a model: `python scripts/pretrain.py configs/pretrain/RECIPE.yaml [--option value ...]`.

Several processes: `accelerate launch --config_file configs/accelerate/FILE.yaml scripts/pretrain.py RECIPE.yaml`.
"""

import sys

from shared_bert.training import parse_recipe, pretrain

if __name__ == "__main__":
    pretrain(*parse_recipe(sys.argv[1:]))
