"""Measures this package beside stock transformers.

python scripts/benchmark.py train                      # the table of the README, on this machine
python scripts/benchmark.py train --task mlm --shapes 8x128 --scheme pairwise
python scripts/benchmark.py train --device cuda --precision bf16 --compile
"""

import argparse
import json
import subprocess
from pathlib import Path

import shared_bert
from shared_bert.evaluation import StepSettings, compare_training_steps, environment

DEFAULT_SCHEMES = {"mlm": "shared", "clm": "query_free"}


def shape(text: str) -> tuple[int, int]:
    batch_size, _, sequence_length = text.partition("x")
    return int(batch_size), int(sequence_length)


def commit() -> str:
    try:
        return subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def train(arguments: argparse.Namespace):
    rows = []
    print(f"{'task':5} {'scheme':11} {'batch':>9} {'stock s':>8} {'shared s':>8} {'memory':>7} {'speedup':>8}")
    for task in arguments.task:
        for batch_size, sequence_length in arguments.shapes:
            scheme = arguments.scheme or DEFAULT_SCHEMES[task]
            settings = StepSettings(
                task,
                batch_size,
                sequence_length,
                scheme,
                precision=arguments.precision,
                compiled=arguments.compile,
                device=arguments.device,
            )
            row = compare_training_steps(settings, arguments.rounds)
            rows.append(row)
            seconds = row["seconds_per_step"]
            print(
                f"{task:5} {scheme:11} {batch_size:>4}x{sequence_length:<4} {seconds['stock']:8.3f} "
                f"{seconds['shared']:8.3f} {row['memory_ratio']:6.2f}x {row['speedup']:7.2f}x",
                flush=True,
            )
    result = {"commit": commit(), **environment(arguments.device), "results": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.output}")
    print("speedup: " + ", ".join(f"{row['speedup']:.2f}" for row in rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="a training step beside the stock model's of the same shape")
    command.add_argument("--task", nargs="+", choices=DEFAULT_SCHEMES, default=list(DEFAULT_SCHEMES))
    command.add_argument("--shapes", nargs="+", type=shape, default=[(8, 128), (4, 512)], metavar="BATCHxTOKENS")
    command.add_argument("--scheme", choices=shared_bert.SCHEMES, help="default: shared (mlm), query_free (clm)")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--compile", action="store_true")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--output", type=Path, default=Path("runs/benchmark_train.json"))
    command.set_defaults(run=train)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
