"""The command `shared-bert-serve`: `transformers serve`, which finds the models of this package, too.

The server looks for a checkpoint's class in the module `transformers` only, whatever the Auto classes know.
"""

import sys

import transformers
from transformers import PreTrainedModel

import shared_bert


def main():
    """Run `transformers serve` with the arguments of the command line."""
    from transformers.cli.transformers import main as transformers_main

    for name in shared_bert.__all__:
        value = getattr(shared_bert, name)
        if isinstance(value, type) and issubclass(value, PreTrainedModel):
            setattr(transformers, name, value)
    if sys.argv[1:2] != ["serve"]:  # its help shows the word
        sys.argv.insert(1, "serve")
    transformers_main()


if __name__ == "__main__":
    main()
