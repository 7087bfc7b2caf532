r"""Train image classifiers that share weights from scratch, and write records, a table and models.

python scripts/train_images.py configs/images/vit_tiny.yaml --images path/to/images --seeds 0,1,2 \
    --depth_sharing masa --num_atoms 2 --output_dir runs/images/masa
python scripts/evaluate.py scores --model runs/images/standard,runs/images/masa --output runs/images/compared.json

Seeds that have a record in OUTPUT_DIR are skipped, so an interrupted command continues.
"""

import sys

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation.image_classification import ImageArguments, ImageTrainingArguments, run_images
from shared_bert.evaluation.records import score_table
from shared_bert.training.recipe import parse_arguments


@reports_user_errors
def main(arguments: list[str]):
    image_args, training_args = parse_arguments(arguments, (ImageArguments, ImageTrainingArguments))
    records = run_images(image_args, training_args)
    if training_args.process_index == 0:
        print(score_table({training_args.output_dir: records}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
