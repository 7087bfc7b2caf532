"""Fine-tune a model on GLUE, and write records, a table and a plot.

python scripts/finetune.py configs/finetune/glue.yaml --model runs/mine --tasks sst2,mrpc --seeds 0,1,2
python scripts/finetune.py configs/finetune/glue.yaml --model google-bert/bert-base-uncased --data_dir path/to/glue

Runs that have a record in OUTPUT_DIR are skipped, so an interrupted command continues.
"""

import sys

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation.glue import GlueArguments, glue_table, run_glue
from shared_bert.training import FinetuningArguments
from shared_bert.training.recipe import parse_arguments


@reports_user_errors
def main(arguments: list[str]):
    glue_args, training_args = parse_arguments(arguments, (GlueArguments, FinetuningArguments))
    records = run_glue(glue_args, training_args)
    if training_args.process_index == 0:
        print(f"\n{glue_table({glue_args.model: records})}\nrecords, table and plot are in {training_args.output_dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
