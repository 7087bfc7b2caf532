"""Show what a trained language model does: fill the [MASK] of each text, or continue it.

python scripts/try_model.py FOLDER "Return the [MASK] of the array."
python scripts/try_model.py FOLDER "Return the"
"""

import argparse
import sys

import torch
from transformers import pipeline

from shared_bert.command_line import reports_user_errors
from shared_bert.conversion.families import FAMILIES, family_of
from shared_bert.data import load_tokenizer
from shared_bert.folders import load_model


def fill_mask(model, tokenizer, text: str):
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(text)
    print(f"\n{text}\n  " + ", ".join(f"{guess['token_str']} ({guess['score']:.0%})" for guess in guesses))


def continue_text(model, tokenizer, text: str):
    torch.manual_seed(0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write(text, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.95)
    print("\n" + written["generated_text"])


@reports_user_errors
def main(arguments: list[str]):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("text", nargs="+")
    parsed = parser.parse_args(arguments)

    model = load_model(parsed.model, [family.language_model for family in FAMILIES.values()])
    tokenizer = load_tokenizer(parsed.model)
    show = {"mlm": fill_mask, "clm": continue_text}[family_of(model.config).objective]
    print(f"{type(model).__name__} ({model.config.attention_scheme}), {model.num_parameters():,} parameters")
    for text in parsed.text:
        show(model, tokenizer, text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
