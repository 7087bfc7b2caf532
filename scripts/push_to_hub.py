"""Push a checkpoint to the Hub: weights, code, tokenizer, metrics and card, in one commit.

python scripts/push_to_hub.py runs/quickstart/shared_bert NAME/shared-bert-tiny
python scripts/push_to_hub.py runs/mine/checkpoint-500 NAME/REPO --revision step-500
python scripts/push_to_hub.py runs/mine NAME/REPO-plain --as-stock --private

Log in first (`hf auth login`), or set HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

from shared_bert.command_line import reports_user_errors
from shared_bert.data import load_tokenizer
from shared_bert.folders import load_sharing_model
from shared_bert.hub import push_to_hub


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the folder of a run, a checkpoint or a saved model of this package")
    parser.add_argument("repo", help="the repository, USER/NAME; it is made if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="the branch to push to; it is made if it is not there (default: main)")
    parser.add_argument("--tag", help="a tag for the commit")
    parser.add_argument("--as-stock", action="store_true", help="push it as the stock model, without code")
    return parser.parse_args(arguments)


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    if not Path(parsed.checkpoint).is_dir():
        raise ValueError(f"{parsed.checkpoint} is not a folder: name a run, a checkpoint or a saved model")
    model = load_sharing_model(parsed.checkpoint)
    load_tokenizer(parsed.checkpoint)  # there must be one
    commit = push_to_hub(
        model,
        parsed.repo,
        private=parsed.private,
        revision=parsed.revision,
        tag=parsed.tag,
        source=parsed.checkpoint,
        as_stock=parsed.as_stock,
    )
    print(f"pushed to {commit.repo_url}: {commit.oid}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
