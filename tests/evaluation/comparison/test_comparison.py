"""A comparison trains every variant alike, goes on where it stopped, and shows what its records say."""

import json
import runpy
import shutil
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from shared_bert import SharedBertConfig, SharedBertForMaskedLM
from shared_bert.evaluation.comparison import (
    Comparison,
    ComparisonRunner,
    check_records,
    cost_report,
    findings,
    has_records,
    write_results,
)
from shared_bert.evaluation.comparison.comparison import non_embedding
from shared_bert.evaluation.comparison.gathering import Results
from shared_bert.evaluation.comparison.narrowing import narrower_fields
from shared_bert.evaluation.comparison.results import report
from shared_bert.evaluation.comparison.runs import best_options
from shared_bert.training.trainer import PretrainingTrainer

from ...training.runs import run as run_process
from ...training.runs import write_text

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "compare.py"
MODEL = {
    "model_type": "shared_bert",
    "attention_scheme": "standard",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0,
}
TRAINING = {
    "tokenizer_vocab_size": 320,
    "sample_by": "line",
    "block_size": 32,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
}
VARIANTS = [{"name": "standard"}, {"name": "shared", "attention_scheme": "shared"}]


def write(folder: Path, **changes) -> Path:
    """Write a comparison of a few seconds; keys that are None are left out."""
    texts = write_text(folder / "text.txt", 60)
    stated = {
        "model": MODEL,
        "variants": VARIANTS,
        "seeds": [0, 1],
        "training": {**TRAINING, "train_file": str(texts)},
        "output_dir": str(folder / "runs"),
        "results_dir": str(folder / "results"),
        **changes,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in stated.items() if value is not None}))
    return path


def complete(path: Path) -> Results:
    comparison = Comparison(path)
    runner = ComparisonRunner(comparison)
    runner.run()
    assert not runner.failed
    write_results(comparison)
    return Results(comparison)


def write_tasks(folder: Path) -> dict:
    """Write texts, minimal pairs and a task, and return the evaluation that reads them."""
    rows = [{"text": line} for line in (folder / "text.txt").read_text().splitlines()[:5]]
    Dataset.from_list(rows).to_parquet(folder / "held_out.parquet")
    pair = {"sentence_good": "the fox hunts .", "sentence_bad": "the the fox ."}
    Dataset.from_list([{**pair, "UID": uid} for uid in "aabbb"]).to_parquet(folder / "pairs.parquet")
    for split, number in (("train", 12), ("validation", 8)):
        texts = ["the fox hunts", "the dog barks"] * (number // 2)
        task = Dataset.from_dict({"sentence": texts, "label": [0, 1] * (number // 2), "idx": range(number)})
        task = task.cast_column("label", ClassLabel(names=["negative", "positive"]))
        (folder / "glue" / "sst2").mkdir(parents=True, exist_ok=True)
        task.to_parquet(folder / "glue" / "sst2" / f"{split}.parquet")
    glue = {"tasks": "sst2", "data_dir": str(folder / "glue"), "num_train_epochs": 1, "max_length": 16}
    return {
        "texts": {"files": {"held_out": str(folder / "held_out.parquet")}, "max_documents": 4},
        "blimp": {"pairs": str(folder / "pairs.parquet"), "max_pairs": 2},
        "glue": glue,
        "noise": {"task": "sst2", "draws": 2, "levels": [0.0, 0.4]},
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison with every evaluation; tests must not change it."""
    folder = tmp_path_factory.mktemp("comparison")
    write(folder)  # the texts
    claim = {"claim": "it is smaller", "source": "here", "of": "reduced", "measure": "blimp", "expected": "higher"}
    path = write(
        folder,
        evaluation=write_tasks(folder),
        claims=[{**claim, "against": "standard"}, {**claim, "against": "narrow"}],
        notes="All are trained for a second.",
    )
    return folder, complete(path)


def test_every_run_has_a_record_that_says_how_it_was_made(finished):
    folder, results = finished
    assert [*results.records] == ["standard", "shared", "narrow_28x57"]
    assert [len(records) for records in results.records.values()] == [2, 2, 2]
    assert not results.missing
    for record in results.every:
        assert record.keys() >= {"commit", "hardware", "torch", "seed", "settings", "variant", "date"}
        assert record["tokens"] == 4 * 4 * 32 == record["curve"][-1]["tokens"]
        assert record["curve"][-1]["loss"] == record["loss"]
        assert 0 <= record["blimp"]["accuracy"] <= 1
        assert record["blimp"]["pairs"] == 4
        assert record["glue"]["sst2"]["metric"] == "accuracy"
        assert [row["level"] for row in record["noise"]] == [0.0, 0.4]
        text = record["texts"]["held_out"]
        assert len(text["document_nats"]) == 4
        assert sum(text["document_nats"]) / sum(text["document_tokens"]) == pytest.approx(text["loss"], abs=1e-3)
    saved = SharedBertForMaskedLM.from_pretrained(folder / "runs" / "models" / "shared-1")
    assert saved.config.attention_scheme == "shared"
    of_shared = results.records["shared"][0]
    parameters = sum(p.numel() for n, p in saved.named_parameters() if not n.endswith("embeddings.weight"))
    assert of_shared["non_embedding"] == parameters


def test_the_sweep_chooses_the_lowest_loss(tmp_path):
    sweep = {"learning_rate": [1e-4, 1e-2], "max_steps": 3}
    results = complete(write(tmp_path, variants=VARIANTS[1:], narrow=False, seeds=[0], sweep=sweep))
    losses = {}
    for path in (tmp_path / "results" / "sweep").glob("shared-*.json"):
        record = json.loads(path.read_text())
        assert record["seed"] not in results.comparison.seeds
        assert record["tokens"] == 3 * 4 * 32
        losses[record["learning_rate"]] = record["loss"]
    assert len(losses) == 2
    best = min(losses, key=losses.get)
    assert best_options(results.comparison, "shared") == {"learning_rate": best}
    assert {record["learning_rate"] for record in results.records["shared"]} == {best}
    low, high = (f"**{losses[rate]:.4f}**" if rate == best else f"{losses[rate]:.4f}" for rate in (1e-4, 1e-2))
    assert f"| `shared` | {low} | {high} |" in report(results)
    more = Comparison(results.comparison.path, seeds=[0, 1, 2])
    check_records(more)  # more seeds leave the sweep as it is
    assert len([run for run in more.runs() if run.tuned]) == 2


def test_tables_show_the_records(finished):
    folder, results = finished
    text = (folder / "results" / "results.md").read_text()
    losses = [record["texts"]["held_out"]["loss"] for record in results.records["shared"]]
    assert f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}" in text
    others = [record["texts"]["held_out"]["loss"] for record in results.records["standard"]]
    difference = statistics.mean(losses) - statistics.mean(others)
    assert f"| `shared` | {difference:+.3f} [" in text
    assert "`shared` − `narrow_28x57`" in text
    assert "it is smaller (here)" in text
    assert "4 documents of held_out" in text
    assert "All are trained for a second." in text
    assert results.every[0]["commit"] in text


def test_records_alone_make_the_same_files(finished, tmp_path):
    folder, _ = finished
    files = ["results.md", "scores.png", "differences.png", "curves.png", "pareto.png"]
    before = {name: (folder / "results" / name).read_bytes() for name in files}
    changes = {"results_dir": str(tmp_path)}
    (tmp_path / "records").symlink_to(folder / "results" / "records")
    write_results(Comparison(folder / "small.yaml", **changes))
    assert {name: (tmp_path / name).read_bytes() for name in files} == before


def test_records_of_other_settings_are_said_to_be(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "records").symlink_to(folder / "results" / "records")
    changes = {"results_dir": str(tmp_path), "training": {**TRAINING, "train_file": "elsewhere.txt"}}
    assert "--redraw --may_differ settings" in report(Results(Comparison(folder / "small.yaml", **changes)))
    assert "--may_differ" not in (folder / "results" / "results.md").read_text()


def test_findings_are_the_claims_of_all_comparisons(finished, tmp_path):
    folder, results = finished
    main = runpy.run_path(str(SCRIPT))["main"]
    page = tmp_path / "new" / "findings.md"
    assert main([str(folder / "small.yaml"), "--redraw", "--findings", str(page)]) == 0
    text = page.read_text()
    counts = {name: records[0]["non_embedding"] for name, records in results.records.items()}
    assert f"`shared` ({counts['shared'] / counts['standard']:.0%}) − `standard` (100%)" in text
    assert "| it is smaller | 2 × **not decided at this scale** (" in text  # one line for both claims of these words
    assert "**not decided at this scale**" in text
    assert "All are trained for a second." in text
    assert "results.md" in text


def test_records_with_other_evaluations_make_no_tables(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "results" / "records", tmp_path / "records")
    path = tmp_path / "records" / "shared-1.json"
    record = json.loads(path.read_text())
    comparison = Comparison(folder / "small.yaml", results_dir=str(tmp_path))
    record["texts"]["held_out"]["document_tokens"].reverse()
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="shared with seed 1 has another loss on held_out than shared with seed 0"):
        write_results(comparison)
    del record["blimp"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="shared with seed 1 has other evaluations than that of standard with seed 0"):
        write_results(comparison)


def test_finished_runs_tell_what_the_others_will_take(finished, tmp_path):
    folder, results = finished
    shutil.copytree(folder / "results" / "records", tmp_path / "records")
    for path in (tmp_path / "records").iterdir():
        path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 3600}))
    comparison = Comparison(folder / "small.yaml", seeds=[0, 1, 2, 3], results_dir=str(tmp_path))
    work = [comparison.flops_of(run) for run in comparison.runs() if run.seed == 0]
    text = cost_report(comparison)
    assert "6 of 12 runs to do" in text
    assert f"By the runs that are done: about {2 * sum(work) / statistics.median(work):.1f} hours" in text
    assert all(record["seconds"] > 0 for record in results.every)


def test_speed_is_measured_in_turns(finished, tmp_path):
    folder, results = finished
    (tmp_path / "records").symlink_to(folder / "results" / "records")
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(folder / "small.yaml"), "--results_dir", str(tmp_path), "--speed"]) == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    speed, quartiles = record["tokens_per_second"], record["quartiles"]
    assert speed.keys() == results.records.keys()
    assert all(low <= speed[name] <= high for name, (low, high) in quartiles.items())
    text = (tmp_path / "results.md").read_text()
    assert "in turns" in text
    low, high = quartiles["shared"]
    assert f"| {speed['shared']:,} ({low:,} to {high:,}) |" in text
    # Of a variant less it is not the speed of all.
    del speed["shared"]
    (tmp_path / "speed.json").write_text(json.dumps(record))
    assert "Speed is that of the runs" in report(Results(Comparison(folder / "small.yaml", results_dir=str(tmp_path))))


def test_finished_runs_are_not_done_again(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(PretrainingTrainer, "train", lambda *_, **__: pytest.fail("it trains again"))
    complete(folder / "small.yaml")


def test_records_of_other_settings_or_commits_are_refused(finished, tmp_path):
    folder, _ = finished
    stated = yaml.safe_load((folder / "small.yaml").read_text())
    path = tmp_path / "small.yaml"

    def changed(**changes) -> Comparison:
        path.write_text(yaml.safe_dump({**stated, **changes}))
        return Comparison(path)

    check_records(changed())
    check_records(changed(seeds=[0, 1, 5]))  # more of the same
    other = changed(training={**stated["training"], "mlm_probability": 0.3})
    with pytest.raises(ValueError, match=r"mlm_probability=None, not 0\.3"):
        check_records(other)
    check_records(other, ["settings"])
    with pytest.raises(ValueError, match="attention_scheme='standard', not 'unified'"):
        check_records(changed(variants=[{"name": "standard", "attention_scheme": "unified"}], narrow=False, claims=[]))


def test_a_record_of_another_commit_is_refused(tmp_path):
    path = write(tmp_path, seeds=[0], variants=VARIANTS[:1])
    complete(path)
    (record,) = (tmp_path / "results" / "records").iterdir()
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "commit": "1234567"}))
    with pytest.raises(ValueError, match=r"commit='1234567'.*--may_differ commit"):
        check_records(Comparison(path))
    check_records(Comparison(path), ["commit"])
    del content["seed"]
    record.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"standard-0\.json lacks seed"):
        check_records(Comparison(path), ["commit"])
    with pytest.raises(ValueError, match=r"standard-0\.json lacks seed"):
        write_results(Comparison(path))


def test_all_variants_see_the_same_tokens_in_the_same_order(tmp_path, monkeypatch):
    seen = {}
    step = PretrainingTrainer.training_step

    def spy(trainer, model, inputs, *args, **kwargs):
        seen.setdefault(Path(trainer.args.output_dir).name, []).append(inputs["input_ids"].clone())
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "training_step", spy)
    masa = {"name": "masa", "depth_sharing": "masa", "num_atoms": 1}
    complete(write(tmp_path, variants=[*VARIANTS, masa], narrow=False))
    batches = {name: torch.stack(found) for name, found in seen.items()}
    for seed in (0, 1):
        of_seed = [found for name, found in batches.items() if name.endswith(f"-{seed}")]
        assert len(of_seed) == 3
        assert all(torch.equal(found, of_seed[0]) for found in of_seed)
    assert not torch.equal(batches["shared-0"], batches["shared-1"])


def test_a_crash_stops_no_other_run_and_is_retried(tmp_path, monkeypatch):
    path = write(tmp_path, narrow=False)
    train = PretrainingTrainer.train

    def crash(trainer, *args, **kwargs):
        if Path(trainer.args.output_dir).name == "standard-1":
            raise RuntimeError("out of luck")
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "train", crash)
    runner = ComparisonRunner(Comparison(path))
    runner.run()
    assert runner.failed == {"standard-1": "RuntimeError: out of luck"}
    write_results(Comparison(path))
    assert "Runs without a record: standard-1." in (tmp_path / "results" / "results.md").read_text()
    monkeypatch.undo()
    assert not complete(path).missing


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path):
    training = {**TRAINING, "train_file": str(write_text(tmp_path / "text.txt")), "max_grad_norm": 0, "max_steps": 8}
    options = {"variants": VARIANTS[1:], "narrow": False, "seeds": [0], "training": training}
    results = complete(write(tmp_path, **options, sweep={"learning_rate": [1e-3, 1e30]}))
    assert results.records["shared"][0]["learning_rate"] == 1e-3
    diverged = json.loads((tmp_path / "results" / "sweep" / "shared-learning_rate=1e+30-1000.json").read_text())
    assert diverged["loss"] is None
    assert "NaN or infinite" in diverged["diverged"]


def test_another_text_gets_a_tokenizer_of_its_own(tmp_path):
    options = {"variants": VARIANTS[:1], "seeds": [0], "narrow": False}
    complete(write(tmp_path, **options))
    (tmp_path / "other.txt").write_text("\n".join(["zyx wvu tsr qpo nml " * 20] * 50))
    training = {**TRAINING, "train_file": str(tmp_path / "other.txt")}
    complete(write(tmp_path, **options, training=training, results_dir=str(tmp_path / "other")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "models" / "standard-0")
    assert tokenizer.unk_token not in tokenizer.tokenize("zyx wvu")


def test_a_variant_whose_sweep_failed_waits(tmp_path, monkeypatch):
    path = write(tmp_path, narrow=False, seeds=[0], sweep={"weight_decay": [0.0, 0.1]})
    monkeypatch.setattr(
        PretrainingTrainer, "train", lambda trainer, **_: 1 / 0 if "shared" in trainer.args.output_dir else None
    )
    runner = ComparisonRunner(Comparison(path))
    runner.run()
    assert runner.failed["shared-weight_decay=0.1-1000"].startswith("ZeroDivisionError")
    assert runner.failed["shared-0"] == "waits for the runs of its sweep"


@pytest.mark.slow
def test_processes_share_the_runs(tmp_path):
    path = write(tmp_path, narrow=False)
    done = run_process(SCRIPT, path, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(Results(Comparison(path)).every) == 4
    assert done.stdout.count("evaluation loss") == 4  # each was trained once


@pytest.mark.slow
def test_the_recipe_in_the_repository_runs_from_nothing_to_its_tables(tmp_path):
    recipe = ROOT / "configs" / "comparisons" / "tiny.yaml"
    options = ["--output_dir", tmp_path / "runs", "--results_dir", tmp_path / "results"]
    done = run_process(SCRIPT, recipe, *options, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hours of one process" in done.stdout
    assert "narrower standard model" in (tmp_path / "results" / "results.md").read_text()


def test_an_architecture_of_transformers(tmp_path):
    model = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    sharing = {"depth_sharing": "masa", "num_atoms": 1}
    path = write(
        tmp_path,
        model=model,
        seeds=[0],
        variants=[{"name": "standard"}, {"name": "masa", "sharing": sharing}],
        training={**TRAINING, "train_file": str(write_text(tmp_path / "text.txt")), "separate_documents": False},
    )
    results = complete(path)
    names = [*results.records]
    counts = {name: records[0]["non_embedding"] for name, records in results.records.items()}
    assert names[:2] == ["standard", "masa"]
    assert counts["masa"] < counts["standard"]
    assert counts[names[2]] == pytest.approx(counts["masa"], rel=0.01)
    stock = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in model.items() if k != "model_type"}, vocab_size=320))
    embeddings = stock.get_input_embeddings().weight.numel()
    assert counts["standard"] == stock.num_parameters() - embeddings
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "runs" / "models" / "masa-0")
    assert saved.config.quantization_config.num_atoms == 1


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([2, 4]),
    width=st.integers(3, 12),
    ratio=st.sampled_from([1, 2, 4]),
    scheme=st.sampled_from(["symmetric", "shared", "query_free"]),
)
def test_the_narrower_model_has_as_many_parameters(heads, width, ratio, scheme):
    shape = {
        "hidden_size": 8 * heads * width,
        "intermediate_size": 8 * heads * width * ratio,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "vocab_size": 64,
    }

    def count(fields, cls=BertForMaskedLM, config=BertConfig):
        with torch.device("meta"):
            model = cls(config(**fields))
        return sum(p.numel() for n, p in model.named_parameters() if not n.endswith("embeddings.weight"))

    wanted = count({**shape, "attention_scheme": scheme}, SharedBertForMaskedLM, SharedBertConfig)
    found = narrower_fields(shape, wanted, count)
    assert abs(count(found) - wanted) <= 0.01 * wanted
    assert found["hidden_size"] % (2 * heads) == 0
    assert found["hidden_size"] <= shape["hidden_size"]
    assert {**found, **{n: shape[n] for n in ("hidden_size", "intermediate_size")}} == shape
    # About as slender: the next width would be no nearer to the ratio.
    assert abs(found["intermediate_size"] / found["hidden_size"] - ratio) < 0.5 * ratio


def test_each_reduced_variant_has_a_narrower_one(tmp_path):
    variants = [
        *VARIANTS,
        {"name": "unified", "attention_scheme": "unified"},
        {"name": "symmetric", "attention_scheme": "symmetric"},
        {"name": "wide", "attention_scheme": "query_free", "intermediate_size": 80},
    ]
    model = {**MODEL, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    comparison = Comparison(write(tmp_path, variants=variants, model=model))
    counts = {name: non_embedding(cost) for name, cost in comparison.costs.items()}
    assert comparison.narrow_of["unified"] == comparison.narrow_of["shared"] != comparison.narrow_of["symmetric"]
    for name, narrow in comparison.narrow_of.items():
        assert counts[narrow] == pytest.approx(counts[name], rel=0.01)


CLAIM = {"claim": "a", "source": "b", "of": "shared", "against": "standard", "measure": "loss", "expected": "lower"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"varants": []}, "'varants'.*'variants'"),
        ({"variants": []}, "variants: there are none"),
        ({"variants": {"name": "a"}}, "'variants' expected a list"),
        ({"variants": [None]}, "variants: None needs a name"),
        ({"variants": [{}]}, "needs a name"),
        ({"variants": [{"name": "a/b"}]}, "'a/b'.* needs a name of letters"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two of the name 'a'"),
        ({"variants": [*VARIANTS, {"name": "narrow_28x57"}]}, "two of the name 'narrow_28x57'"),
        (
            {"variants": [{"name": "a", "atention_scheme": "shared"}]},
            "variant a: .*'atention_scheme'.*attention_scheme",
        ),
        ({"variants": [{"name": "a", "attention_scheme": "shard"}]}, "variant a: .*shard"),
        ({"variants": [{"name": "a", "sharing": "masa"}]}, "variant a: sharing='masa' must be keys"),
        ({"variants": [{"name": "a", "training": {"block_size": 8}}]}, "variant a: training: .*'block_size'"),
        ({"variants": [{"name": "a", "training": {"max_steps": 8}}]}, "variant a: training: .*'max_steps'"),
        (
            {"variants": [{"name": "a", "training": {"learning_rate": 1}}], "sweep": {"learning_rate": [1.0]}},
            "variant a: training: .*'learning_rate'",
        ),
        ({"variants": [*VARIANTS, {"name": "a", "model_type": "shared_gpt"}]}, "a shared_gpt is not trained as"),
        ({"variants": VARIANTS[1:]}, "the baseline shared shares weights itself"),
        ({"variants": [{"name": "a", "attention_scheme": "shared_kv"}]}, "the baseline a shares weights itself"),
        ({"baseline": "b"}, "baseline='b' is none of"),
        (
            {"model": {**MODEL, "hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 1}},
            "beside shared: no narrower standard model",
        ),
        ({"model": {"hidden_size": 32}}, "model lacks model_type"),
        ({"model": []}, "'model' expected a dict"),
        ({"narrow": "false"}, "'narrow' expected bool"),
        ({"seeds": [0, 0]}, "seeds=.*twice"),
        ({"seeds": ["a"]}, "Invalid item at index 0 in list 'seeds'"),
        ({"seeds": []}, "seeds=.*must be numbers"),
        ({"seeds": [-1]}, "seeds=.*must be numbers from 0"),
        ({"training": []}, "'training' expected a dict"),
        ({"training": {**TRAINING, "max_steps": -1}}, "max_steps"),
        ({"training": {**TRAINING, "output_dir": "x"}}, "output_dir is not an option"),
        ({"training": {**TRAINING, "max_step": 3}}, "'max_step'.*'max_steps'"),
        ({"training": {**TRAINING, "block_size": 64}}, "block_size=64 is more than"),
        ({"sweep": {"learning_rat": [1]}}, "sweep: .*'learning_rat'"),
        ({"sweep": {"learning_rate": ["fast"]}}, "sweep: .*learning_rate"),
        ({"sweep": {"learning_rate": [-1.0]}}, "learning_rate=.*must be numbers from 0"),
        ({"sweep": {"learning_rate": [1.0], "max_steps": 0}}, "max_steps=0 must be 1 or more"),
        ({"sweep": {"learning_rate": [1.0], "seed": 0}}, "none of those that are reported"),
        ({"sweep": {}}, "give values of learning_rate or weight_decay"),
        ({"evaluation": []}, "'evaluation' expected a dict"),
        ({"evaluation": {"blim": {}}}, "evaluation: .*'blim'"),
        ({"evaluation": {"blimp": None}}, "evaluation: blimp must be keys and values"),
        ({"evaluation": {"blimp": {}}}, "evaluation: blimp lacks pairs"),
        ({"evaluation": {"texts": {"files": {}, "max_documents": 0}}}, "max_documents=0 must be 1"),
        ({"evaluation": {"glue": {"tasks": "sst3"}}}, "sst3"),
        ({"evaluation": {"noise": {"task": "sst2"}}}, "noise needs task=sst2"),
        ({"claims": [None]}, "claims must be keys and values"),
        ({"claims": [{"claim": "a"}]}, "claims lacks source"),
        ({"claims": [{**CLAIM, "measure": "los"}]}, "'los' is not measured, only loss"),
        ({"claims": [{**CLAIM, "against": "shared"}]}, "'shared' cannot be held against 'shared'"),
        ({"claims": [{**CLAIM, "of": "standard", "against": "narrow"}]}, "'standard' cannot be held against 'narrow'"),
        ({"claims": [{**CLAIM, "of": "reduced"}], "narrow": False}, "'a' is of no variant"),
        ({"claims": [{**CLAIM, "expected": "same"}]}, "within=0 must be above 0"),
    ],
)
def test_bad_comparisons_are_named(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Comparison(path)
    assert not (tmp_path / "runs").exists()


def test_a_comparison_extends_another(tmp_path):
    base = Comparison(write(tmp_path))
    changes = {"model": {"hidden_size": 48}, "training": {"max_steps": 9}, "seeds": [7]}
    path = tmp_path / "larger.yaml"
    path.write_text(yaml.safe_dump({"extends": "small.yaml", **changes}))
    larger = Comparison(path)
    assert larger.seeds == [7]
    assert larger.training == {**base.training, "max_steps": 9}
    assert larger.model == {**base.model, "hidden_size": 48}
    assert [variant.name for variant in larger.variants[:2]] == ["standard", "shared"]
    path.write_text("extends: absent.yaml")
    with pytest.raises(ValueError, match=r"absent\.yaml cannot be read"):
        Comparison(path)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"blimp": {"pairs": "absent.parquet"}}, "absent.parquet is not a file"),
        ({"texts": {"files": {"a": "absent.txt"}}}, "absent.txt is not a file"),
        ({"glue": {"tasks": "sst2", "data_dir": "absent"}}, "data_dir=absent is not a folder"),
    ],
)
def test_files_that_are_not_there_are_named_before_training(tmp_path, evaluation, message):
    comparison = Comparison(write(tmp_path, evaluation=evaluation))
    with pytest.raises(ValueError, match=message):
        ComparisonRunner(comparison)
    assert not (tmp_path / "runs").exists()


def test_a_network_of_coefficients_counts_as_these(tmp_path):
    masa = {"name": "masa", "depth_sharing": "masa", "num_atoms": 1}
    variants = [VARIANTS[0], masa, {**masa, "name": "network", "coefficient_source": "network"}]
    costs = Comparison(write(tmp_path, variants=variants, narrow=False)).costs
    assert costs["network"].parameters == costs["masa"].parameters


def test_a_comparison_without_records_has_no_tables(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([str(write(tmp_path)), "--redraw"]) == 2
    assert "has no records" in capsys.readouterr().err
    assert main([str(write(tmp_path)), "--cost"]) == 0
    assert "6 of 6 runs to do" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()


COMPARISONS = sorted((ROOT / "configs" / "comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_comparison_in_the_repository_can_be_made(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Comparison(path).runs()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_committed_results_are_those_of_their_records(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    committed = Comparison(path).results_dir
    if not (committed / "results.md").exists():
        pytest.skip(f"{committed} has no results")
    again = Comparison(path, results_dir=str(tmp_path))
    for part in ("records", "sweep", "speed.json"):
        if (committed / part).exists():
            (tmp_path / part).symlink_to((committed / part).resolve())
    write_results(again)
    for file in tmp_path.glob("*.*"):
        assert file.read_bytes() == (committed / file.name).read_bytes(), file.name


def test_committed_findings_are_those_of_the_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    comparisons = [Comparison(path) for path in COMPARISONS]
    committed = [one for one in comparisons if one.results_dir.parts[0] == "model_cards" and has_records(one)]
    page = Path("model_cards/findings.md")
    assert page.read_text() == findings(committed, page)
