"""The README says what is so: its code runs, its files exist, its counts are the models'."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shared_bert
from shared_bert.modeling.configuration_shared_attention import DEPTH_SHARING
from tests.conftest import tiny_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory):
    """A folder that looks as after the quickstart, with untrained models."""
    from datasets import Dataset

    from shared_bert.data import train_tokenizer

    folder = tmp_path_factory.mktemp("readme")
    documents = Dataset.from_dict({"text": ["Return the mean of the array, and nothing else."] * 20})
    for kind, tokenizer_kind in (("bert", "wordpiece"), ("gpt", "byte_bpe")):
        tokenizer = train_tokenizer(tokenizer_kind, documents, vocab_size=300, model_max_length=40)
        model = tiny_model(kind, vocab_size=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
        for part in (model, tokenizer):
            part.save_pretrained(folder / "runs" / "quickstart" / f"shared_{kind}")
    return folder


@pytest.mark.parametrize("code", blocks("python"))
def test_code_runs_by_itself(code, quickstart_folder):
    run = subprocess.run([sys.executable, "-c", code], cwd=quickstart_folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_commands_name_files_that_exist():
    words = [word for block in blocks("bash") for word in shlex.split(block)]
    files = [word for word in words if re.match(r"(scripts|configs)/", word)]
    assert "scripts/quickstart.sh" in files
    assert all((ROOT / file).is_file() for file in files)


def test_options_of_commands_are_valid(monkeypatch):
    from shared_bert.training import parse_recipe

    monkeypatch.chdir(ROOT)
    commands = [line for block in blocks("bash") for line in block.splitlines() if "scripts/pretrain.py" in line]
    assert commands
    for command in commands:
        arguments = shlex.split(command)
        parse_recipe(
            [*arguments[arguments.index("scripts/pretrain.py") + 1 :], "--use_cpu", "true", "--bf16", "false"]
        )


def test_options_of_conversions_are_valid():
    parse = runpy.run_path(str(ROOT / "scripts" / "convert.py"))["parse"]
    commands = [line for block in blocks("bash") for line in block.splitlines() if "scripts/convert.py" in line]
    assert {shlex.split(command)[2] for command in commands} == {"from-stock", "to-stock"}
    for command in commands:
        parse(shlex.split(command)[2:])


def test_options_of_pushes_are_valid():
    parse = runpy.run_path(str(ROOT / "scripts" / "push_to_hub.py"))["parse"]
    commands = [line for block in blocks("bash") for line in block.splitlines() if "scripts/push_to_hub.py" in line]
    assert len(commands) > 2
    for command in commands:
        parse(shlex.split(command)[2:])


def test_the_counting_command_runs():
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if "count_parameters" in line)
    run = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert "attention" in run.stdout, run.stderr


def test_depth_sharings_are_listed():
    for name in DEPTH_SHARING:
        assert f"| `{name}` |" in README


def test_every_recipe_is_listed():
    for recipe in (ROOT / "configs" / "pretrain").glob("*.yaml"):
        assert f"`{recipe.name}`" in README


def test_counts_of_the_scheme_table():
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([\d,]{9,}) \|", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(shared_bert.SCHEMES)
    for name, count in rows:
        with torch.device("meta"):
            model = shared_bert.SharedBertForMaskedLM(shared_bert.SharedBertConfig(attention_scheme=name))
        assert model.num_parameters() == int(count.replace(",", ""))


def test_roles_of_the_scheme_table():
    for name, scheme in shared_bert.SCHEMES.items():
        assert f"| `{name}` | {scheme.query} | {scheme.key} | {scheme.value} |" in README


def test_figures_are_the_kept_results():
    kept = json.loads((ROOT / "model_cards" / "benchmark_train_cpu.json").read_text())["results"]
    assert len(kept) == 4
    for row in kept:
        settings, seconds = row["settings"]["shared"], row["seconds_per_step"]
        assert (
            f"| `{settings['attention_scheme']}` | {settings['batch_size']} × {settings['sequence_length']} "
            f"| {seconds['stock']:.2f} s | {seconds['shared']:.2f} s | {row['speedup']:.2f}× "
            f"| {row['memory_ratio']:.2f}× |"
        ) in README
    for model in ("bert", "gpt"):
        curve = json.loads((ROOT / "model_cards" / "quickstart" / f"shared_{model}_loss_curve.json").read_text())
        assert f"| {curve['evaluation'][-1]['loss']:.2f} | {curve['unigram_entropy']:.2f} |" in README


def test_conversions_are_the_kept_results():
    kept = json.loads((ROOT / "model_cards" / "minilm_conversion.json").read_text())
    card = (ROOT / "model_cards" / "minilm_conversion.md").read_text()
    assert f"{kept['original']:.4f}" in README
    rows = re.findall(r"^\| `([\w,= ]+)` \| ([\d.]+) % \| ([\d. |–]+) \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    for name, saved, figures in rows:
        row = kept["rows"][name]
        report = row["report"]
        assert float(saved) == round(100 * (1 - report["parameters_after"] / report["parameters_before"]), 1)
        columns = ("unaligned", "weights_only", "calibrated", "healed")
        expected = [f"{row['spearman'][c]:.3f}" if c in row["spearman"] else "–" for c in columns]
        assert figures.split(" | ") == expected
        assert f"| `{name}` |" in card


def test_overhead_is_the_kept_result():
    kept = json.loads((ROOT / "model_cards" / "benchmark_depth_cpu.json").read_text())["results"]
    for row in kept:
        assert f"{row['overhead']:+.1%}".replace("%", " %").replace("-", "−") in README


def test_decoding_is_the_kept_result():
    (row,) = json.loads((ROOT / "model_cards" / "benchmark_decode_cpu.json").read_text())["results"]
    low, _, high = row["speedup_quartiles"]
    assert f"{row['speedup']:.2f}× its\nspeed (quartiles of nine alternating rounds {low:.2f} to {high:.2f}" in README
    for seconds in row["seconds_per_token"].values():
        assert f"{1000 * seconds:.1f} ms" in README
