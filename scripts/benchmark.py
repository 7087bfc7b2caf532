"""Compare this package with stock transformers, and depth sharing with separate layers.

python scripts/benchmark.py train                      # a training step of both tasks
python scripts/benchmark.py train --task mlm --shapes 8x128 --scheme pairwise
python scripts/benchmark.py train --device cuda --precision bf16 --compile
python scripts/benchmark.py memory                     # of a training step, without its time
python scripts/benchmark.py encode                     # all schemes, without gradients
python scripts/benchmark.py decode --scheme shared     # generation, and the bytes of the cache
python scripts/benchmark.py packed --train_file FILE   # pre-training on packed documents, and on padded ones
python scripts/benchmark.py finetune --model FOLDER    # fine-tuning at real lengths, and with padding to 128
python scripts/benchmark.py startup RECIPE             # seconds to the first step of pre-training
python scripts/benchmark.py growth                     # time and memory against length and batch
python scripts/benchmark.py profile                    # where the time of a step goes
python scripts/benchmark.py load --model A,B --command "shared-bert-serve MODEL"   # a server under load
python scripts/benchmark.py efficiency --model A,B,C   # size, work, time and memory of several models beside stock
python scripts/benchmark.py deploy --model FOLDER      # a sentence encoder and its conversions in several runtimes

train, encode and decode compare with the stock model of the same shape; with --sharing they compare depth sharing with
separate layers.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import transformers

import shared_bert
from shared_bert.command_line import reports_user_errors
from shared_bert.data import first_rows, load_documents, load_tokenizer, train_tokenizer
from shared_bert.data.tasks import load_glue
from shared_bert.evaluation import StepSettings, TrainingStep, compare_training_steps, environment, peak_memory
from shared_bert.evaluation.efficiency import (
    DecodingSettings,
    Encoding,
    compare,
    compare_decoding,
    profile_step,
    speed_table,
)
from shared_bert.evaluation.efficiency_table import efficiency_table, measure_efficiency, read_config
from shared_bert.evaluation.growth import draw_growth, growth_table, measure_growth
from shared_bert.evaluation.packing_speed import compare_packing
from shared_bert.evaluation.serving_load import load_table, load_test, served
from shared_bert.folders import load_model
from shared_bert.training.arguments import read_overrides

DEFAULT_SCHEMES = {"mlm": "shared", "clm": "query_free"}


def shape(text: str) -> tuple[int, int]:
    batch_size, _, sequence_length = text.partition("x")
    return int(batch_size), int(sequence_length)


def pair(arguments: argparse.Namespace, task: str, batch: tuple[int, int], scheme: str, **more) -> dict:
    """Return the settings of the two models that are compared, by name."""
    settings = StepSettings(
        task,
        *batch,
        scheme,
        precision=arguments.precision,
        compiled=arguments.compile,
        device=arguments.device,
        model_fields=tuple(read_overrides(arguments.model_fields).items()),
    )
    if more:
        settings = DecodingSettings(**vars(settings), **more)
    if not arguments.sharing:
        return {"stock": replace(settings, attention_scheme=None), "shared": settings}
    sharing = tuple(read_overrides(arguments.sharing).items())
    return {"own": settings, "shared": replace(settings, model_fields=settings.model_fields + sharing)}


def as_dicts(compared: dict[str, StepSettings]) -> dict[str, dict]:
    return {name: asdict(settings) for name, settings in compared.items()}


def describe(compared: dict[str, StepSettings]) -> str:
    settings = compared["shared"]
    return f"{settings.task} {settings.batch_size}x{settings.sequence_length}"


def report(arguments: argparse.Namespace, rows: Iterable[dict]):
    """Print each row when it is there, and write all, with their table."""
    kept = []
    for row in rows:
        kept.append(row)
        header, _, line = speed_table([row]).splitlines()
        print(line if len(kept) > 1 else f"{header}\n{line}", flush=True)
    write(arguments, kept)
    arguments.output.with_suffix(".md").write_text(speed_table(kept))
    print("speedup: " + ", ".join(f"{row['speedup']:.2f}" for row in kept))


def training_steps(arguments: argparse.Namespace) -> Iterator[dict]:
    """Return the pairs of all tasks and shapes."""
    for task in arguments.task:
        for batch in arguments.shapes:
            yield pair(arguments, task, batch, arguments.scheme or DEFAULT_SCHEMES[task])


def train(arguments: argparse.Namespace):
    measure = partial(compare, TrainingStep) if arguments.skip_memory else compare_training_steps
    report(arguments, (measure(compared, arguments.rounds) for compared in training_steps(arguments)))


def profile(arguments: argparse.Namespace):
    rows = []
    for compared in training_steps(arguments):
        seconds = {name: profile_step(settings) for name, settings in compared.items()}
        rows.append({"settings": as_dicts(compared), "seconds": seconds})
        print(describe(compared), flush=True)
        for name, by_operator in seconds.items():
            print(f"  {name}: {sum(by_operator.values()):.2f} s")
            for operator, of_operator in list(by_operator.items())[:15]:
                print(f"    {of_operator:8.3f} s  {operator}")
    write(arguments, rows)


def encode(arguments: argparse.Namespace):
    def rows() -> Iterator[dict]:
        for scheme in arguments.scheme:
            for batch in arguments.shapes:
                yield compare(Encoding, pair(arguments, "mlm", batch, scheme), arguments.rounds)

    report(arguments, rows())


def decode(arguments: argparse.Namespace):
    def rows() -> Iterator[dict]:
        for scheme in arguments.scheme:
            for batch in arguments.shapes:
                compared = pair(arguments, "clm", batch, scheme, new_tokens=arguments.new_tokens)
                yield compare_decoding(compared, arguments.rounds)

    report(arguments, rows())


def memory(arguments: argparse.Namespace):
    rows = []
    for compared in training_steps(arguments):
        peaks = {name: peak_memory(settings) for name, settings in compared.items()}
        before, after = peaks.values()
        rows.append({"settings": as_dicts(compared), "peak_memory_bytes": peaks, "memory_ratio": after / before})
        print(f"{describe(compared)}: {before / 2**30:.2f} and {after / 2**30:.2f} GiB", flush=True)
    write(arguments, rows)
    print("memory: " + ", ".join(f"{row['memory_ratio']:.2f}" for row in rows))


def packed(arguments: argparse.Namespace):
    documents = load_documents(train_file=arguments.train_file)["train"]
    documents = first_rows(documents.shuffle(seed=0), arguments.documents)
    if arguments.tokenizer_name:
        tokenizer = load_tokenizer(arguments.tokenizer_name)
    else:
        longest = max(length for _, length in arguments.shapes)
        tokenizer = train_tokenizer("wordpiece", documents, arguments.vocab_size, model_max_length=longest)
    rows = []
    for batch in arguments.shapes:
        settings = pair(arguments, "mlm", batch, arguments.scheme)["shared"]
        fields = (*settings.model_fields, ("vocab_size", math.ceil(len(tokenizer) / 64) * 64))
        row = compare_packing(replace(settings, model_fields=fields), documents, tokenizer, arguments.rounds)
        rows.append({"text": Path(arguments.train_file).name, **row})
        for name, speed in row["tokens_per_second"].items():
            print(f"{name} {speed:10,.0f} real tokens/s, {row['real_share'][name]:.0%} of the positions", flush=True)
    write(arguments, rows)
    print("speedup: " + ", ".join(f"{row['speedup']:.2f}" for row in rows))


def startup(arguments: argparse.Namespace):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), arguments.recipe]
        command += ["--output_dir", folder, "--overwrite_output_dir", "--max_steps", "2", "--logging_steps", "1"]
        command += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "true", *arguments.options]
        first, *seconds = (seconds_to_first_step(command) for _ in range(arguments.rounds + 1))
    row = {"recipe": arguments.recipe, "options": arguments.options, "seconds": seconds, "with_preparation": first}
    print(f"{first:.1f} s with the preparation of the text; prepared: {statistics.median(seconds):.1f} s")
    write(arguments, [row])


def seconds_to_first_step(command: list[str]) -> float:
    """Return the seconds from the start of a process until it prints the loss of its first step."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "'loss'" in line:
                seconds = time.perf_counter() - start
                process.stdout.read()
                return seconds
    raise ValueError(f"{' '.join(command)} ended before its first step:\n{''.join(printed[-5:])}")


def growth(arguments: argparse.Namespace):
    job = TrainingStep if arguments.job == "train" else Encoding
    longest = max([*arguments.lengths, arguments.shapes[0][1]])
    fields = f"max_position_embeddings={longest}"
    arguments.model_fields = f"{arguments.model_fields},{fields}" if arguments.model_fields else fields
    compared = pair(
        arguments, arguments.task, arguments.shapes[0], arguments.scheme or DEFAULT_SCHEMES[arguments.task]
    )
    rows = measure_growth(compared, job, arguments.lengths, arguments.batch_sizes, arguments.rounds)
    write(arguments, rows)
    arguments.output.with_suffix(".md").write_text(growth_table(rows))
    draw_growth(rows, arguments.output.with_suffix(".png"))
    print(growth_table(rows))


def finetune(arguments: argparse.Namespace):
    from shared_bert.evaluation.finetuning_speed import compare_padding  # needs the extra finetune

    splits = load_glue(arguments.task, arguments.data_dir)
    rows = {split: first_rows(part, arguments.rows) for split, part in splits.items()}
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


def load(arguments: argparse.Namespace):
    rows = []
    for model in arguments.model.split(","):
        command = [model if word == "MODEL" else word for word in shlex.split(arguments.command)]
        with tempfile.TemporaryDirectory() as folder, served(command, Path(folder, "log")) as url:
            row = load_test(
                url, model, arguments.clients, arguments.requests, arguments.prompt_words, arguments.new_tokens
            )
        rows.append({"server": arguments.server or command[0], "model": Path(model).name, **row})
        print(load_table(rows[-1:]), flush=True)
    write(arguments, rows)
    arguments.output.with_suffix(".md").write_text(load_table(rows))


def deploy(arguments: argparse.Namespace):
    # Needs the extra train, and for each runtime an extra of its own.
    from shared_bert.evaluation.deployment import deployed_models, deployment_table, measure_deployment

    original = load_model(arguments.model, [transformers.BertModel])
    result = measure_deployment(deployed_models(original), rounds=arguments.rounds)
    table = deployment_table(result)
    print(table)
    write(arguments, [result])
    arguments.output.with_suffix(".md").write_text(table)


def write(arguments: argparse.Namespace, rows: list[dict]):
    result = {**environment(arguments.device), "results": rows}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {arguments.output}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    schemes = {"choices": shared_bert.SCHEMES, "help": "default: shared (mlm), query_free (clm)"}

    for run, shapes, text in (
        (train, [(8, 128), (4, 512)], "a training step"),
        (profile, [(4, 512)], "where the time of a training step goes, by operator"),
        (memory, [(4, 512)], "the peak memory of a training step"),
    ):
        command = commands.add_parser(run.__name__, help=text)
        command.add_argument("--task", nargs="+", choices=DEFAULT_SCHEMES, default=list(DEFAULT_SCHEMES))
        command.add_argument("--scheme", **schemes)
        if run is train:
            command.add_argument(
                "--skip_memory", action="store_true", help="which is measured in processes of its own"
            )
        add_common_options(command, run, shapes)

    command = commands.add_parser("encode", help="hidden states of texts, without gradients")
    command.add_argument("--scheme", nargs="+", choices=shared_bert.SCHEMES, default=list(shared_bert.SCHEMES))
    add_common_options(command, encode, [(8, 128), (1, 16)])

    command = commands.add_parser("decode", help="greedy generation after a prompt")
    command.add_argument("--scheme", nargs="+", choices=shared_bert.SCHEMES, default=["standard"])
    command.add_argument("--new_tokens", type=int, default=128)
    add_common_options(command, decode, [(1, 64)])

    command = commands.add_parser("packed", help="masked language modeling on packed documents, and on padded ones")
    command.add_argument("--train_file", required=True, help="documents: .parquet, .txt or .json(l)")
    command.add_argument("--documents", type=int, default=2000, help="read no more than this")
    command.add_argument("--tokenizer_name", help="default: train one on the documents")
    command.add_argument("--vocab_size", type=int, default=30522, help="of a trained tokenizer")
    command.add_argument("--scheme", choices=shared_bert.SCHEMES, default="shared")
    add_common_options(command, packed, [(4, 512)])

    command = commands.add_parser("growth", help="time and memory against the length of a text and the batch")
    command.add_argument("--job", choices=["train", "encode"], default="train")
    command.add_argument("--task", choices=DEFAULT_SCHEMES, default="mlm")
    command.add_argument("--scheme", **schemes)
    command.add_argument("--lengths", nargs="*", type=int, default=[2**i for i in range(7, 14)])
    command.add_argument("--batch_sizes", nargs="*", type=int, default=[2**i for i in range(7)])
    add_common_options(command, growth, [(1, 128)])
    command.set_defaults(rounds=3)

    command = commands.add_parser("startup", help="from the start of a pre-training to its first step, text prepared")
    command.add_argument("recipe", help="of scripts/pretrain.py; options of this command stand before it")
    command.add_argument("options", nargs=argparse.REMAINDER, help="of scripts/pretrain.py")
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--output", type=Path)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.set_defaults(run=startup, output=Path("runs/benchmark_startup.json"))

    command = commands.add_parser("finetune", help="fine-tuning at real lengths, compared with padding to 128 tokens")
    command.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    add_task_options(command, "sst2", 4096)
    command.add_argument("--max_length", type=int, default=128, help="what the other side pads to")
    command.add_argument("--epochs", type=int, default=1)
    command.add_argument("--learning_rate", type=float, default=1e-4)
    command.set_defaults(run=finetune, output=Path("runs/benchmark_finetune.json"))

    command = commands.add_parser("load", help="a server of completions under the load of several clients")
    command.add_argument("--model", required=True, help="folders, one server each: A,B,C")
    command.add_argument("--command", required=True, help="starts a server of MODEL; --host and --port are added")
    command.add_argument("--server", help="its name in the table; default: the first word of the command")
    command.add_argument("--clients", type=int, default=8)
    command.add_argument("--requests", type=int, default=300)
    command.add_argument("--prompt_words", type=int, default=32)
    command.add_argument("--new_tokens", type=int, default=16)
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="of the server, for the record")
    command.add_argument("--output", type=Path)
    command.set_defaults(run=load, output=Path("runs/benchmark_load.json"))

    command = commands.add_parser("efficiency", help="several models beside the stock model of the first one's shape")
    command.add_argument("--model", required=True, help="folders, Hub names or YAML config files: A,B,C")
    command.add_argument("--tokenizer_name", help="of all models; default: the first model's")
    add_task_options(command, "cola", 1024)
    command.set_defaults(run=efficiency, output=Path("runs/benchmark_efficiency.json"))

    command = commands.add_parser("deploy", help="a sentence encoder and its conversions in several runtimes")
    command.add_argument("--model", required=True, help="a stock BERT without a head: a folder, or a name on the Hub")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--output", type=Path)
    command.set_defaults(run=deploy, device="cpu", output=Path("runs/benchmark_deploy.json"))
    parsed = parser.parse_args(arguments)
    if parsed.output.suffix != ".json":  # tables and plots are written beside it
        raise ValueError(f"--output {parsed.output} must end in .json")
    return parsed


def add_task_options(command: argparse.ArgumentParser, task: str, rows: int):
    command.add_argument("--task", default=task, help="of GLUE")
    command.add_argument("--data_dir", help="a folder per task; else the Hub")
    command.add_argument("--rows", type=int, default=rows, help="train on no more rows than this")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--rounds", type=int, default=3)
    command.add_argument("--output", type=Path)


def add_common_options(command: argparse.ArgumentParser, run: Callable, shapes: list[tuple[int, int]]):
    command.add_argument("--shapes", nargs="+", type=shape, default=shapes, metavar="BATCHxTOKENS")
    command.add_argument("--model_fields", default="", help="config fields of both models: a=1,b=x")
    command.add_argument(
        "--sharing", default="", help="config fields that share over depth: a=1,b=x; compares with separate layers"
    )
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    command.add_argument("--compile", action="store_true")
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--output", type=Path)
    command.set_defaults(run=run, output=Path(f"runs/benchmark_{run.__name__}.json"))


@reports_user_errors
def main(arguments: list[str]):
    parsed = parse(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
