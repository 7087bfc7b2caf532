"""Fine-tune a model on GLUE, SQuAD or data of your own, and write records, a table and models.

python scripts/finetune.py configs/finetune/glue.yaml --model runs/mine --tasks sst2,mrpc --seeds 0,1,2
python scripts/finetune.py configs/finetune/glue.yaml --model google-bert/bert-base-uncased --data_dir path/to/glue
python scripts/finetune.py configs/finetune/squad.yaml --model runs/mine --train_file A.json --validation_file B.json
python scripts/finetune.py configs/finetune/text.yaml --model runs/mine --train_file A.json --validation_file B.json
python scripts/finetune.py configs/finetune/tokens.yaml --model runs/mine --dataset_name NAME --label_column ner_tags

Runs that have a record in OUTPUT_DIR are skipped, so an interrupted command continues.
"""

import argparse
import sys

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation.classification import GlueArguments, TaskArguments, run_classification
from shared_bert.evaluation.records import score_table
from shared_bert.evaluation.squad import SquadArguments, run_squad, squad_table
from shared_bert.training import FinetuningArguments
from shared_bert.training.recipe import parse_arguments
from shared_bert.training.yaml_files import load_mapping

KINDS = {
    "glue": (GlueArguments, run_classification, score_table),
    "text": (TaskArguments, run_classification, score_table),
    "tokens": (TaskArguments, run_classification, score_table),
    "choice": (TaskArguments, run_classification, score_table),
    "squad": (SquadArguments, run_squad, squad_table),
}


def kind_of(arguments: list[str]) -> str:
    """Return the kind that the options or the recipe name; "glue" if neither does."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--kind", choices=KINDS)
    kind = parser.parse_known_args(arguments)[0].kind
    if kind is None and arguments and not arguments[0].startswith("-"):
        kind = load_mapping(arguments[0]).get("kind")
    return "glue" if kind is None else kind


@reports_user_errors
def main(arguments: list[str]):
    kind = kind_of(arguments)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    of_kind, run, table = KINDS[kind]
    task_args, training_args = parse_arguments(arguments, (of_kind, FinetuningArguments))
    records = run(task_args, training_args)
    if training_args.process_index == 0:
        print(f"\n{table({task_args.model: records})}\nrecords, tables and models are in {training_args.output_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
