"""Count a model's parameters, next to those of standard attention.

python scripts/count_parameters.py configs/models/shared_bert_base.yaml
python scripts/count_parameters.py configs/models/shared_bert_base.yaml --config_overrides attention_scheme=pairwise
python scripts/count_parameters.py runs/quickstart/shared_bert --sequence_length 64
"""

import argparse
import sys

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation import cost_table, load_config


@reports_user_errors
def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML or JSON file of config fields, or the folder of a saved model")
    parser.add_argument("--config_overrides", help="config fields that replace others: a=1,b=x")
    parser.add_argument("--sequence_length", type=int, help="tokens per row; default: as many as the model can read")
    parsed = parser.parse_args(arguments)
    print(cost_table(load_config(parsed.config, parsed.config_overrides), parsed.sequence_length))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
