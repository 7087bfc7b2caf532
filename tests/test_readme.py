"""The documents say what is so: their code runs, their files exist, their figures are the measured ones."""

import json
import re
import runpy
import shlex
import statistics
from pathlib import Path

import pytest
import torch

import shared_bert
from shared_bert.modeling.configuration_shared_attention import DEPTH_SHARING
from tests.conftest import tiny_model
from tests.processes import run_python

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    name: (ROOT / name).read_text()
    for name in (
        "README.md",
        "configs/README.md",
        "scripts/README.md",
        "model_cards/README.md",
        "shared_bert/README.md",
        "shared_bert/conversion/README.md",
        "shared_bert/injection/README.md",
        "shared_bert/serving/README.md",
    )
}
# Records of fine-tuning whose tables are kept.
SCORES = ("encoders/glue.json", "minilm_finetuning.json", "vit_fashion_mnist.json")
README, MEASUREMENTS = DOCUMENTS["README.md"], DOCUMENTS["model_cards/README.md"]


def blocks(language: str) -> list[str]:
    return [block for text in DOCUMENTS.values() for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


def commands(script: str) -> list[list[str]]:
    """The arguments of every command of the documents that runs `script`."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if f"scripts/{script}" in line]
    assert lines
    return [words[words.index(f"scripts/{script}") + 1 :] for words in map(shlex.split, lines)]


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
    run = run_python("-c", code, cwd=quickstart_folder)
    assert run.returncode == 0, run.stderr


def test_files_exist():
    words = [word for block in blocks("bash") for word in shlex.split(block, comments=True)]
    files = [ROOT / word for word in words if re.match(r"(scripts|configs)/", word)]
    for name, text in DOCUMENTS.items():
        links = re.findall(r"\]\((?!http)([^)#]+)\)|src=\"([^\"]+)\"", text)
        files += [(ROOT / name).parent / (link or source) for link, source in links]
    assert ROOT / "scripts" / "quickstart.sh" in files
    assert [file for file in files if not file.is_file()] == []


def test_every_document_is_linked_from_the_readme():
    assert [name for name in DOCUMENTS if name != "README.md" and f"]({name})" not in README] == []


def test_options_of_pretraining_are_valid(monkeypatch):
    from shared_bert.training import parse_recipe

    monkeypatch.chdir(ROOT)
    for arguments in commands("pretrain.py"):
        parse_recipe([*arguments, "--use_cpu", "true", "--bf16", "false"])


def test_options_of_finetuning_are_valid(monkeypatch):
    from shared_bert.training import FinetuningArguments
    from shared_bert.training.recipe import parse_arguments

    monkeypatch.chdir(ROOT)
    script = runpy.run_path(str(ROOT / "scripts" / "finetune.py"))
    for arguments in commands("finetune.py"):
        task_arguments = script["KINDS"][script["kind_of"](arguments)][0]
        parse_arguments([*arguments, "--use_cpu", "true"], (task_arguments, FinetuningArguments))


def test_options_of_images_are_valid(monkeypatch):
    from shared_bert.evaluation.image_classification import ImageArguments, ImageTrainingArguments
    from shared_bert.training.recipe import parse_arguments

    monkeypatch.chdir(ROOT)
    for arguments in commands("train_images.py"):
        parse_arguments([*arguments, "--use_cpu", "true"], (ImageArguments, ImageTrainingArguments))


@pytest.mark.parametrize(
    "script",
    ["convert.py", "push_to_hub.py", "benchmark.py", "convert_minilm.py", "convert_smollm2.py", "evaluate.py"],
)
def test_options_are_valid(script):
    parse = runpy.run_path(str(ROOT / "scripts" / script))["parse"]
    for arguments in commands(script):
        parse(arguments)


def test_the_counting_command_runs():
    (arguments,) = commands("count_parameters.py")
    run = run_python("scripts/count_parameters.py", *arguments, cwd=ROOT)
    assert "attention" in run.stdout, run.stderr


def test_depth_sharings_are_listed():
    for name in DEPTH_SHARING:
        assert f"| `{name}` |" in README


def test_every_recipe_is_listed():
    for recipe in (
        path for folder in ("pretrain", "finetune", "images") for path in (ROOT / "configs" / folder).glob("*")
    ):
        assert f"`{recipe.name}`" in DOCUMENTS["configs/README.md"]


def test_every_command_is_listed():
    for script in (ROOT / "scripts").glob("*.py"):
        assert f"scripts/{script.name}" in DOCUMENTS["scripts/README.md"]


def test_every_model_is_listed():
    for name in shared_bert.__all__:
        if re.fullmatch(r"Shared(Bert|Gpt)(Model|For\w+)", name):
            assert f"`{name}`" in DOCUMENTS["shared_bert/README.md"]


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


def kept(name: str) -> dict:
    return json.loads((ROOT / "model_cards" / name).read_text())


# The records of each table of speeds.
SPEEDS = {
    "training": ["benchmark_train_cpu", "benchmark_train_clm_shared_cpu"],
    "compiled": ["benchmark_train_compiled_cpu"],
    "encoding": ["benchmark_encode_cpu"],
    "decoding": ["benchmark_decode_long_cpu", "benchmark_decode_stock_cpu"],
    "training on an Intel Xeon": ["intel/mlm", "intel/clm", "intel/clm_shared"],
    "encoding on an Intel Xeon": ["intel/encode"],
    "decoding on an Intel Xeon": ["intel/decode"],
    "gpu": ["gpu/mlm", "gpu/clm", "gpu/clm_shared", "gpu/mlm_compiled", "gpu/clm_compiled"],
}


def speeds(table: str) -> list[dict]:
    return [row for name in SPEEDS[table] for row in kept(f"{name}.json")["results"]]


@pytest.mark.parametrize("table", SPEEDS)
def test_speeds_are_the_kept_results(table):
    from shared_bert.evaluation.efficiency import speed_table

    assert speed_table(speeds(table)) in MEASUREMENTS


def test_speeds_of_the_readme_are_kept():
    rows = [row for table in SPEEDS for row in speeds(table)]
    rows += kept("benchmark_packed_cpu.json")["results"]
    results = README[README.index("## Results") : README.index("## Limits")]
    for line in results.splitlines():
        if re.match(r"\| (training steps?, `|training steps on|MLM on|hidden|decoding 512)", line):
            figures = set(re.findall(r"[\d.]+×", line.split("|")[3]))
            assert figures <= {f"{row[key]:.2f}×" for row in rows for key in ("speedup", "memory_ratio") if key in row}


def test_packed_documents_are_the_kept_result():
    (row,) = kept("benchmark_packed_cpu.json")["results"]
    assert f"{row['speedup']:.2f}× the real tokens" in MEASUREMENTS
    for name in ("padded", "packed"):
        cells = f"{row['tokens_per_second'][name]:.0f} | {row['real_share'][name]:.0%}"
        assert f"| {name} | {cells} |" in MEASUREMENTS


def test_the_start_is_the_kept_result():
    (row,) = kept("benchmark_startup_cpu.json")["results"]
    assert f"{statistics.median(row['seconds']):.1f} s on text that is packed" in MEASUREMENTS


def test_growth_is_redrawn_from_its_record():
    from shared_bert.evaluation.growth import growth_table

    assert growth_table(kept("benchmark_growth_cpu.json")["results"]) in MEASUREMENTS


def test_quickstart_losses_are_the_kept_results():
    for model in ("bert", "gpt"):
        curve = kept(f"quickstart/shared_{model}_loss_curve.json")
        assert f"| {curve['evaluation'][-1]['loss']:.2f} | {curve['unigram_entropy']:.2f} |" in MEASUREMENTS


def test_scores_are_redrawn_from_their_records(tmp_path):
    from shared_bert.evaluation.records import load_compared, write_scores

    for name in SCORES:
        path = ROOT / "model_cards" / name
        write_scores(load_compared([path], may_differ=["bf16"]), tmp_path / path.name)
        table = path.with_suffix(".md").read_text()
        assert (tmp_path / path.with_suffix(".md").name).read_text() == table
        assert table in MEASUREMENTS


def test_smaller_attention_is_the_kept_result():
    from shared_bert.evaluation.decoder_conversions import table

    for name in ("smollm2_conversions.json", "smollm2_sizes.json"):
        assert table(kept(name)) in MEASUREMENTS


def test_encoders_are_the_kept_results():
    for scheme in kept("encoders/glue.json"):
        losses = [
            kept(f"encoders/pretraining/{scheme}_{rows}_loss_curve.json")["evaluation"][-1]["loss"]
            for rows in (16, 128)
        ]
        assert f"| `{scheme}` | {losses[0]:.2f} | {losses[1]:.2f} |" in MEASUREMENTS


def test_noise_is_the_kept_result():
    for model, levels in kept("encoders/noise_sst2.json")["results"].items():
        cells = [f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" for row in levels[::2]]
        assert f"| `{Path(model).name}` | {' | '.join(cells)} |" in MEASUREMENTS


def test_fine_tuning_at_real_lengths_is_the_kept_result():
    (row,) = kept("benchmark_finetune_cpu.json")["results"]
    assert f"{row['speedup']:.1f}× as fast" in MEASUREMENTS
    assert f"{row['speedup']:.1f}×" in README
    for kind, seconds in row["seconds_per_epoch"].items():
        assert f"| {seconds:.1f} s | {100 * row['scores'][kind]:.1f} % |" in MEASUREMENTS


def test_the_costs_are_the_kept_result():
    from shared_bert.evaluation.efficiency_table import efficiency_table

    (result,) = kept("benchmark_efficiency_cpu.json")["results"]
    assert efficiency_table(result) in MEASUREMENTS


def test_deployment_is_the_kept_result():
    from shared_bert.evaluation.deployment import deployment_table

    (result,) = kept("benchmark_deploy_cpu.json")["results"]
    assert deployment_table(result) in MEASUREMENTS


@pytest.mark.parametrize("server", ["transformers", "vllm"])
def test_servers_under_load_are_the_kept_results(server):
    from shared_bert.evaluation.serving_load import load_table

    rows = kept(f"benchmark_load_{server}_cpu.json")["results"]
    assert load_table(rows) in MEASUREMENTS


def test_conversions_are_the_kept_results():
    result = kept("minilm_conversion.json")
    card = (ROOT / "model_cards" / "minilm_conversion.md").read_text()
    assert f"{result['original']:.4f}" in MEASUREMENTS
    rows = re.findall(r"^\| `([\w,+= ]+)` \| ([\d.]+) % \| ([\d. |–]+) \|$", MEASUREMENTS, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == list(result["rows"])
    for name, saved, figures in rows:
        row = result["rows"][name]
        report = row["report"]
        assert float(saved) == round(100 * (1 - report["parameters_after"] / report["parameters_before"]), 1)
        columns = ("unaligned", "weights_only", "calibrated", "healed")
        expected = [f"{row['spearman'][c]:.3f}" if c in row["spearman"] else "–" for c in columns]
        assert figures.split(" | ") == expected
        assert f"| `{name}` |" in card


def test_conversions_of_the_readme_are_measured():
    table = dict(re.findall(r"^\| `([\w,+= ]+)` \| ([\d.]+ % \| [\d. |–]+) \|$", MEASUREMENTS, flags=re.MULTILINE))
    names = {"MASA, S = 3,": "masa, S = 3", "low rank": "low_rank, r = 96"}
    rows = re.findall(
        r"^\| MiniLM converted to (`\w+`|MASA, S = 3,|low rank) .*?([\d.]+ %).*\| ([\d.]+) \|$", README, re.M
    )
    assert len(rows) == 4
    for name, saved, spearman in rows:
        figures = table[names.get(name, name.strip("`"))]
        assert figures.startswith(saved)
        assert spearman in figures


def test_compared_decoders_are_the_kept_result():
    text = (ROOT / "model_cards" / "comparisons" / "decoders_one_rate" / "results.md").read_text()
    losses = dict(re.findall(r"^\| `(\w+)` \|(?:[^|]+\|){6} ([\d.]+) ±", text, re.M))
    (row,) = re.findall(r"^\| `shared` decoder .*$", README, re.M)
    assert re.findall(r"\d\.\d{3}", row) == [losses[name] for name in ("standard", "narrow_224x432", "shared")]


def test_overhead_is_the_kept_result():
    for row in kept("benchmark_depth_cpu.json")["results"]:
        overhead = f"{1 / statistics.median(row['speedup_quartiles']) - 1:+.1%}".replace("%", " %").replace("-", "−")
        assert overhead in MEASUREMENTS
        assert overhead in README


def test_decoding_is_the_kept_result():
    (row,) = kept("benchmark_decode_cpu.json")["results"]
    low, _, high = row["speedup_quartiles"]
    speedup = f"{row['speedup']:.2f}×"
    expected = f"{speedup} its speed (quartiles of {row['rounds']} alternating rounds {low:.2f} to {high:.2f})"
    assert expected in " ".join(MEASUREMENTS.split())
    assert f"{speedup} the speed" in README
    for seconds in row["seconds_per_token"].values():
        assert f"{1000 * seconds:.1f} ms" in MEASUREMENTS
