"""Compare this package with stock transformers, and depth sharing with separate layers.

python scripts/benchmark.py train                      # the table of the README, on this machine
python scripts/benchmark.py train --task mlm --shapes 8x128 --scheme pairwise
python scripts/benchmark.py train --device cuda --precision bf16 --compile
python scripts/benchmark.py depth                      # what assembling the matrices of MASA adds to a step
python scripts/benchmark.py decode                     # decoding with MASA and without
python scripts/benchmark.py finetune --model FOLDER    # fine-tuning at real lengths, and with padding to 128
python scripts/benchmark.py efficiency --model A,B,C   # size, work, time and memory of several models beside stock
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import shared_bert
from shared_bert.command_line import reports_user_errors
from shared_bert.data import load_tokenizer
from shared_bert.data.tasks import load_glue
from shared_bert.evaluation import StepSettings, compare_decoding, compare_training_steps, environment
from shared_bert.evaluation.efficiency_table import efficiency_table, measure_efficiency, read_config
from shared_bert.evaluation.finetuning_speed import compare_padding
from shared_bert.training.arguments import read_overrides

DEFAULT_SCHEMES = {"mlm": "shared", "clm": "query_free"}


def shape(text: str) -> tuple[int, int]:
    batch_size, _, sequence_length = text.partition("x")
    return int(batch_size), int(sequence_length)


def step_settings(arguments: argparse.Namespace, task: str, batch: tuple[int, int], scheme: str) -> StepSettings:
    return StepSettings(
        task,
        *batch,
        scheme,
        precision=arguments.precision,
        compiled=arguments.compile,
        device=arguments.device,
        model_fields=tuple(read_overrides(arguments.model_fields).items()),
    )


def train(arguments: argparse.Namespace):
    rows = []
    print(f"{'task':5} {'scheme':11} {'batch':>9} {'stock s':>8} {'shared s':>8} {'memory':>7} {'speedup':>8}")
    for task in arguments.task:
        for batch in arguments.shapes:
            scheme = arguments.scheme or DEFAULT_SCHEMES[task]
            settings = step_settings(arguments, task, batch, scheme)
            compared = {"stock": replace(settings, attention_scheme=None), "shared": settings}
            row = compare_training_steps(compared, arguments.rounds)
            rows.append(row)
            seconds = row["seconds_per_step"]
            print(
                f"{task:5} {scheme:11} {batch[0]:>4}x{batch[1]:<4} {seconds['stock']:8.3f} "
                f"{seconds['shared']:8.3f} {row['memory_ratio']:6.2f}x {row['speedup']:7.2f}x",
                flush=True,
            )
    write(arguments, rows)
    print("speedup: " + ", ".join(f"{row['speedup']:.2f}" for row in rows))


def depth(arguments: argparse.Namespace):
    rows = []
    print(f"{'task':5} {'scheme':11} {'batch':>9} {'own s':>8} {'shared s':>8} {'memory':>7} {'overhead':>8}")
    for batch in arguments.shapes:
        own = step_settings(arguments, arguments.task, batch, arguments.scheme)
        sharing = tuple(read_overrides(arguments.sharing).items())
        compared = {"own": own, "shared": replace(own, model_fields=own.model_fields + sharing)}
        row = compare_training_steps(compared, arguments.rounds)
        # Round by round: a machine that slows down for a while slows both steps of a round.
        row["overhead"] = 1 / statistics.median(row["speedup_quartiles"]) - 1
        rows.append(row)
        seconds = row["seconds_per_step"]
        print(
            f"{arguments.task:5} {arguments.scheme:11} {batch[0]:>4}x{batch[1]:<4} {seconds['own']:8.3f} "
            f"{seconds['shared']:8.3f} {row['memory_ratio']:6.2f}x {row['overhead']:8.1%}",
            flush=True,
        )
    write(arguments, rows)


def decode(arguments: argparse.Namespace):
    rows = []
    print(f"{'scheme':11} {'batch':>9} {'own ms':>8} {'shared ms':>9} {'speedup':>8} {'quartiles':>16}")
    for batch in arguments.shapes:
        own = step_settings(arguments, "clm", batch, arguments.scheme)
        sharing = tuple(read_overrides(arguments.sharing).items())
        compared = {"own": own, "shared": replace(own, model_fields=own.model_fields + sharing)}
        row = compare_decoding(compared, arguments.new_tokens, arguments.rounds)
        rows.append(row)
        own_ms, shared_ms = (1000 * seconds for seconds in row["seconds_per_token"].values())
        low, high = row["speedup_quartiles"][0], row["speedup_quartiles"][-1]
        print(
            f"{arguments.scheme:11} {batch[0]:>4}x{batch[1]:<4} {own_ms:8.2f} {shared_ms:9.2f} "
            f"{row['speedup']:7.2f}x {low:7.2f} to {high:.2f}",
            flush=True,
        )
    write(arguments, rows)


def finetune(arguments: argparse.Namespace):
    splits = load_glue(arguments.task, arguments.data_dir)
    rows = {split: part.select(range(min(arguments.rows, len(part)))) for split, part in splits.items()}
    row = compare_padding(
        arguments.model,
        load_tokenizer(arguments.model),
        arguments.task,
        rows,
        arguments.max_length,
        rounds=arguments.rounds,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=32,
        use_cpu=arguments.device == "cpu",
        disable_tqdm=True,
    )
    for kind, seconds in row["seconds_per_epoch"].items():
        print(f"{kind:12} {seconds:8.2f} s per epoch   score {row['scores'][kind]:.4f}")
    print(f"speedup {row['speedup']:.2f}x ({min(row['speedups']):.2f} to {max(row['speedups']):.2f})")
    write(arguments, [row])


def efficiency(arguments: argparse.Namespace):
    names = arguments.model.split(",")
    result = measure_efficiency(
        {name: read_config(name) for name in names},
        load_tokenizer(arguments.tokenizer_name or names[0]),
        arguments.task,
        load_glue(arguments.task, arguments.data_dir),
        rows=arguments.rows,
        rounds=arguments.rounds,
        device=arguments.device,
    )
    table = efficiency_table(result)
    print(table)
    write(arguments, [result])
    arguments.output.with_suffix(".md").write_text(table + "\n")


def write(arguments: argparse.Namespace, rows: list[dict]):
    result = {**environment(arguments.device), "results": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.output}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", help="a training step, compared with the stock model of the same shape")
    command.add_argument("--task", nargs="+", choices=DEFAULT_SCHEMES, default=list(DEFAULT_SCHEMES))
    command.add_argument("--scheme", choices=shared_bert.SCHEMES, help="default: shared (mlm), query_free (clm)")
    add_common_options(command, [(8, 128), (4, 512)])
    command.set_defaults(run=train, output=Path("runs/benchmark_train.json"))
    command = commands.add_parser("depth", help="a training step with depth sharing, compared with separate layers")
    command.add_argument("--task", choices=DEFAULT_SCHEMES, default="mlm")
    command.add_argument("--scheme", choices=shared_bert.SCHEMES, default="standard")
    masa = "depth_sharing=masa,num_atoms=4,depth_shared_matrices=qkvo,coefficient_source=network"
    command.add_argument("--sharing", default=masa, help="config fields of the sharing model: a=1,b=x; default: masa")
    add_common_options(command, [(8, 512), (32, 128)])
    command.set_defaults(run=depth, output=Path("runs/benchmark_depth.json"))
    command = commands.add_parser("decode", help="decoding with depth sharing, compared with separate layers")
    command.add_argument("--scheme", choices=shared_bert.SCHEMES, default="standard")
    masa = "depth_sharing=masa,num_atoms=3,depth_shared_matrices=qkvo"
    command.add_argument("--sharing", default=masa, help="config fields of the sharing model: a=1,b=x; default: masa")
    command.add_argument("--new_tokens", type=int, default=128)
    add_common_options(command, [(1, 64)])
    shape = "hidden_size=512,num_hidden_layers=8,num_attention_heads=8,intermediate_size=2048,vocab_size=8192"
    command.set_defaults(run=decode, model_fields=shape, output=Path("runs/benchmark_decode.json"))
    command = commands.add_parser("finetune", help="fine-tuning at real lengths, compared with padding to 128 tokens")
    command.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    add_task_options(command, "sst2", 4096)
    command.add_argument("--max_length", type=int, default=128, help="what the other side pads to")
    command.add_argument("--epochs", type=int, default=1)
    command.add_argument("--learning_rate", type=float, default=1e-4)
    command.set_defaults(run=finetune, output=Path("runs/benchmark_finetune.json"))
    command = commands.add_parser("efficiency", help="several models beside the stock model of the first one's shape")
    command.add_argument("--model", required=True, help="folders, Hub names or YAML config files: A,B,C")
    command.add_argument("--tokenizer_name", help="of all models; default: the first model's")
    add_task_options(command, "cola", 1024)
    command.set_defaults(run=efficiency, output=Path("runs/benchmark_efficiency.json"))
    return parser.parse_args(arguments)


def add_task_options(command: argparse.ArgumentParser, task: str, rows: int):
    command.add_argument("--task", default=task, help="of GLUE")
    command.add_argument("--data_dir", help="a folder per task; else the Hub")
    command.add_argument("--rows", type=int, default=rows, help="train on no more rows than this")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--output", type=Path)


def add_common_options(command: argparse.ArgumentParser, shapes: list[tuple[int, int]]):
    command.add_argument("--shapes", nargs="+", type=shape, default=shapes, metavar="BATCHxTOKENS")
    command.add_argument("--model_fields", default="", help="config fields of both models: a=1,b=x")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--compile", action="store_true")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--output", type=Path)


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
