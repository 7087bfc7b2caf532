"""Shows what a trained language model does: fills the [MASK] of each text, or writes on from it.

python scripts/try_model.py FOLDER "Return the [MASK] of the array."
python scripts/try_model.py FOLDER "Return the"
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

import shared_bert  # noqa: F401 - registers the models


def fill_mask(model, tokenizer, text: str):
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(text)
    print(f"\n{text}\n  " + ", ".join(f"{guess['token_str']} ({guess['score']:.0%})" for guess in guesses))


def write_on(model, tokenizer, text: str):
    torch.manual_seed(0)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (written,) = write(text, max_new_tokens=60, do_sample=True, temperature=0.7, top_p=0.95)
    print("\n" + written["generated_text"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("text", nargs="+")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    (architecture,) = AutoConfig.from_pretrained(arguments.model).architectures
    is_masked = architecture.endswith("ForMaskedLM")
    auto, show = (AutoModelForMaskedLM, fill_mask) if is_masked else (AutoModelForCausalLM, write_on)
    model = auto.from_pretrained(arguments.model)
    print(f"{type(model).__name__} ({model.config.attention_scheme}), {model.num_parameters():,} parameters")
    for text in arguments.text:
        show(model, tokenizer, text)


if __name__ == "__main__":
    main()
