"""GLUE: every task runs and resumes, and its table is what one computes by hand."""

import json
import runpy
import statistics
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, EvalPrediction

import shared_bert
from shared_bert.data.tasks import GLUE, Task, check_split, load_glue, tokenize_task
from shared_bert.evaluation.classification import GlueArguments, run_classification
from shared_bert.evaluation.records import score_table
from shared_bert.training import FinetuningArguments, FinetuningTrainer
from shared_bert.training.metrics import TASK_METRICS, check_metrics, task_metrics

from ..conftest import TINY, tiny_model

ROOT = Path(__file__).parents[2]
WORDS = ("the fox hunts", "the dog barks", "the owl sees", "the cat naps")


@pytest.fixture
def glue(tmp_path):
    """A folder with few rows of every task."""
    generator = np.random.default_rng(0)
    for name, task in GLUE.items():
        for split, number in (("train", 12), *((split, 6) for split in task.validation)):
            rows = {column: [WORDS[i] for i in generator.integers(4, size=number)] for column in task.texts}
            numbers = generator.integers(len(task.labels or "123456"), size=number)
            dataset = Dataset.from_dict(
                {**rows, "label": numbers if task.labels else numbers / 1.0, "idx": range(number)}
            )
            if task.labels:
                dataset = dataset.cast_column("label", ClassLabel(names=list(task.labels)))
            (tmp_path / "glue" / name).mkdir(parents=True, exist_ok=True)
            dataset.to_parquet(tmp_path / "glue" / name / f"{split}.parquet")
    return tmp_path / "glue"


@pytest.fixture
def saved(tokenizers, tmp_path):
    def saved(kind):
        if kind == "stock":
            model = BertForMaskedLM(BertConfig(**TINY | {"vocab_size": 320}))
        else:
            model = tiny_model(kind, vocab_size=320)
        model.save_pretrained(tmp_path / "model")
        tokenizers["gpt" if kind == "gpt" else "bert"].save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return saved


def run(model, glue, tmp_path, training=None, **options):
    arguments = GlueArguments(model=model, data_dir=str(glue), max_length=16, **options)
    fields = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True}
    return run_classification(
        arguments, FinetuningArguments(output_dir=str(tmp_path / "out"), **fields | (training or {}))
    )


@pytest.mark.parametrize(("kind", "tasks"), [("bert", list(GLUE)), ("gpt", ["cola", "stsb"]), ("stock", ["mnli"])])
def test_every_task_runs(kind, tasks, saved, glue, tmp_path):
    records = run(saved(kind), glue, tmp_path, tasks=",".join(tasks))
    assert [record["task"] for record in records] == sorted(tasks)
    for record in records:
        assert len(record["epochs"]) == 2
        assert record["score"] == next(iter(record["metrics"].values()))
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / record["task"] / "seed-0")
        labels = GLUE[record["task"]].labels or ("score",)
        assert tuple(model.config.id2label.values()) == labels
        if record["task"] == "mnli":
            assert list(record["metrics"]) == ["matched_accuracy", "mismatched_accuracy"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 0
    assert (tmp_path / "out" / "results.md").read_text().count("|") > 10


def test_an_interrupted_command_goes_on(saved, glue, tmp_path, monkeypatch):
    model = saved("bert")
    run(model, glue, tmp_path, tasks="rte", seeds="0,1")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "records").iterdir()}
    assert len(first) == 2
    records = run(model, glue, tmp_path, tasks="rte,mrpc", seeds="0,1")
    assert [(record["task"], record["seed"]) for record in records] == [
        ("mrpc", 0),
        ("mrpc", 1),
        ("rte", 0),
        ("rte", 1),
    ]
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    for name, value in (("learning_rate", 0.1), ("label_smoothing_factor", 0.1), ("max_grad_norm", 0.5)):
        with pytest.raises(ValueError, match=rf"has results with {name}=.*, not {value}"):
            run(model, glue, tmp_path, training={name: value}, tasks="rte")


def test_a_task_that_fails_does_not_stop_the_others(saved, glue, tmp_path):
    path = str(glue / "stsb" / "train.parquet")
    Dataset.from_parquet(path).map(lambda row: {"label": 1e30}).to_parquet(path)
    with pytest.raises(ValueError, match=r"^stsb failed: .*NaN or infinite"):
        run(saved("bert"), glue, tmp_path, tasks="stsb,mrpc")
    assert [path.name for path in (tmp_path / "out" / "records").iterdir()] == ["mrpc-0.json"]
    assert "mrpc" in (tmp_path / "out" / "results.md").read_text()


def test_rows_longer_than_the_model_are_refused(saved, glue, tmp_path):
    arguments = GlueArguments(model=saved("bert"), data_dir=str(glue), max_length=41)
    with pytest.raises(ValueError, match="max_length=41 is more than the model's max_position_embeddings=40"):
        run_classification(arguments, FinetuningArguments(output_dir=str(tmp_path / "out"), use_cpu=True))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_at_once(saved, glue, tmp_path):
    model = saved("bert")
    for training, options, message in (
        ({"eval_strategy": "no"}, {"epoch": "best"}, "epoch=best needs an evaluation"),
        ({}, {"config_overrides": "dropout=0.1"}, "a shared_bert has no field 'dropout'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, glue, tmp_path, training, **options)
    assert not (tmp_path / "out").exists()


def test_seeds_differ_and_repeat(saved, glue, tmp_path):
    model = saved("bert")
    first = run(model, glue, tmp_path, tasks="stsb", seeds="0,1")
    assert first[0]["epochs"] != first[1]["epochs"]
    (tmp_path / "out" / "records" / "stsb-1.json").unlink()
    again = run(model, glue, tmp_path, tasks="stsb", seeds="0,1")
    assert again[1]["epochs"][-1]["eval_loss"] == pytest.approx(first[1]["epochs"][-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "sst"}, "'sst' is not a GLUE task; the nearest is 'sst2'"),
        ({"seeds": "0,one"}, "seeds='0,one' must be numbers"),
        ({"tasks": ""}, "tasks='' names no task"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be 1 or more"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GlueArguments(model="any", **options)


def test_rows_are_checked(glue):
    rows = Dataset.from_parquet(str(glue / "rte" / "train.parquet"))

    def write(changed):
        changed.to_parquet(glue / "rte" / "validation.parquet")

    write(rows.remove_columns("sentence2"))
    with pytest.raises(ValueError, match="rte, validation: there is no column 'sentence2'"):
        load_glue("rte", glue)
    write(rows.select([]))
    with pytest.raises(ValueError, match=r"validation.parquet cannot be read: .*no data"):
        load_glue("rte", glue)
    with pytest.raises(ValueError, match="any: there are no rows"):
        check_split(rows.select([]), GLUE["rte"], "any")
    plain = rows.cast_column("label", Dataset.from_dict({"label": [0]}).features["label"])
    write(plain.map(lambda row: {"label": -1}))
    with pytest.raises(ValueError, match="rte, validation: all labels are -1"):
        load_glue("rte", glue)
    write(plain.map(lambda row: {"label": 7}))
    with pytest.raises(ValueError, match="the labels 7 are not from 0 to 1"):
        load_glue("rte", glue)
    write(rows.cast_column("label", ClassLabel(names=["not_entailment", "entailment"])))
    with pytest.raises(ValueError, match="the labels are not_entailment, entailment, not entailment, not_entailment"):
        load_glue("rte", glue)
    for label, message in ((-1.0, "all labels are -1"), (float("nan"), "a label is missing, NaN or infinite")):
        with pytest.raises(ValueError, match=f"stsb, test: {message}"):
            check_split(
                Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [label]}),
                GLUE["stsb"],
                "stsb, test",
            )
    (glue / "rte" / "validation.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file validation.parquet"):
        load_glue("rte", glue)


def test_a_pair_is_one_row(glue, tokenizers):
    rows = load_glue("rte", glue)["train"]
    tokens = tokenize_task(rows, GLUE["rte"], tokenizers["bert"], max_length=12)
    for row, found in zip(rows, tokens, strict=True):
        expected = tokenizers["bert"](row["sentence1"], row["sentence2"], truncation=True, max_length=12)
        assert found == {**expected, "labels": row["label"], "length": len(expected["input_ids"])}
    padded = tokenize_task(rows, GLUE["rte"], tokenizers["bert"], max_length=12, padding="max_length")
    assert set(padded["length"]) == {12}


def test_metrics_are_those_of_the_definitions():
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(2, size=50), generator.normal(size=(50, 2))
    task = Task(("a",), ("no", "yes"), ("accuracy", "f1", "matthews_correlation"))
    found = task_metrics(task)(EvalPrediction(logits, labels))
    predictions = logits.argmax(1)
    tp, tn = ((predictions == v) & (labels == v) for v in (1, 0))
    fp, fn = (predictions > labels).sum(), (predictions < labels).sum()
    tp, tn = tp.sum(), tn.sum()
    assert found["accuracy"] == pytest.approx((tp + tn) / 50)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert found["matthews_correlation"] == pytest.approx((tp * tn - fp * fn) / root)

    targets, numbers = generator.normal(size=50), generator.normal(size=(50, 1))
    task = Task(("a",), None, ("pearson", "spearmanr"))
    found = task_metrics(task)(EvalPrediction(numbers, targets))
    assert found["pearson"] == pytest.approx(np.corrcoef(numbers[:, 0], targets)[0, 1])
    ranks = [values.argsort().argsort() for values in (numbers[:, 0], targets)]
    assert found["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert task_metrics(task)(EvalPrediction(np.ones((50, 1)), targets)) == {"pearson": 0.0, "spearmanr": 0.0}
    with pytest.raises(ValueError, match="'acuracy' is not a metric; the nearest is 'accuracy'"):
        check_metrics(["acuracy"])


@pytest.mark.parametrize(
    ("labels", "metric", "kind"),
    [
        (None, "accuracy", "text"),
        (("a", "b"), "pearson", "text"),
        (("a", "b", "c"), "f1", "text"),
        (("a", "b"), "span_f1", "text"),
        (("a", "b"), "spearmanr", "tokens"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(labels, metric, kind):
    with pytest.raises(ValueError, match=f"^{metric}: metrics of this task can be "):
        task_metrics(Task(("text",), labels, (metric,), kind=kind))


@pytest.mark.parametrize("name", TASK_METRICS)
def test_metrics_are_those_of_evaluate(name):
    evaluate = pytest.importorskip("evaluate")
    try:
        metric = evaluate.load(name)
    except Exception as error:  # whatever the client meets without a network
        pytest.skip(f"evaluate cannot load {name}: {type(error).__name__}")
    labels, predictions = np.arange(20) % 2, np.arange(20) % 3 % 2
    (expected,) = metric.compute(predictions=predictions, references=labels).values()
    assert TASK_METRICS[name](predictions, labels) == pytest.approx(float(expected))


def test_a_table_by_hand():
    def records(accuracies):
        return [
            {"task": task, "seed": seed, "score": accuracy, "metric": "accuracy"}
            for task, found in accuracies.items()
            for seed, accuracy in enumerate(found)
        ]

    first = {"sst2": [0.9, 0.92], "rte": [0.6, 0.7]}
    second = {"sst2": [0.8]}
    table = score_table({"one": records(first), "two": records(second)})
    assert table.splitlines() == [
        "| model | sst2 (accuracy) | rte (accuracy) | mean |",
        "|---|---|---|---|",
        f"| one | 91.00 ± {statistics.stdev([90, 92]):.2f} | 65.00 ± {statistics.stdev([60, 70]):.2f} | 78.00 |",
        "| two | 80.00 |  |  |",
    ]


def write_records(folder, scores, **settings):
    """Records of one task, as fine-tuning writes them."""
    (folder / "records").mkdir(parents=True)
    for seed, score in enumerate(scores):
        record = {"task": "rte", "seed": seed, "score": score, "metric": "accuracy", "epoch": "last"}
        record["settings"] = {"model": str(folder), "learning_rate": 1e-4, **settings}
        (folder / "records" / f"rte-{seed}.json").write_text(json.dumps(record))


def test_models_are_compared_by_seed(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]
    first, second = [0.6, 0.62, 0.7], [0.63, 0.66, 0.72]
    write_records(tmp_path / "one", first)
    write_records(tmp_path / "two", second)
    folders = f"{tmp_path / 'one'},{tmp_path / 'two'}"
    assert main(["scores", "--model", folders, "--output", str(tmp_path / "scores.json")]) == 0
    differences = [100 * (b - a) for a, b in zip(first, second, strict=True)]
    # 4.3027 is the 97.5 % point of Student's distribution with two degrees of freedom.
    half = 4.3027 * statistics.stdev(differences) / 3**0.5
    text = (tmp_path / "scores.md").read_text()
    assert f"| two | +3.00 [{3 - half:+.2f}, {3 + half:+.2f}] |" in text
    assert "after the last epoch, mean ± standard deviation over the seeds 0, 1, 2" in text
    assert (tmp_path / "scores.png").stat().st_size > 0
    again = ["scores", "--model", str(tmp_path / "scores.json"), "--output", str(tmp_path / "again.json")]
    assert main(again) == 0
    assert (tmp_path / "again.md").read_text() == text

    write_records(tmp_path / "three", first, learning_rate=1e-5)
    assert main(["scores", "--model", f"{folders},{tmp_path / 'three'}"]) == 2
    assert "three: learning_rate=1e-05, but 0.0001 in the first" in capsys.readouterr().err
    options = ["--may_differ", "learning_rate", "--output", str(tmp_path / "three.json")]
    assert main(["scores", "--model", f"{folders},{tmp_path / 'three'}", *options]) == 0
    assert main(["scores", "--model", str(tmp_path / "nothing")]) == 2
    assert "nothing has no records of fine-tuning" in capsys.readouterr().err


def test_the_best_epoch_is_the_saved_one(saved, glue, tmp_path):
    training = {"num_train_epochs": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    (record,) = run(saved("bert"), glue, tmp_path, training, tasks="stsb", epoch="best")
    scores = [epoch["eval_pearson"] for epoch in record["epochs"]]
    assert record["score"] == max(scores) == record["best"]["eval_pearson"]
    folder = tmp_path / "out" / "stsb" / "seed-0"
    results = json.loads((folder / "eval_results.json").read_text())
    assert results["eval_pearson"] == pytest.approx(max(scores))
    assert "best epoch" in (tmp_path / "out" / "results.md").read_text()


def test_the_head_has_a_learning_rate_of_its_own(tmp_path):
    model = tiny_model("bert", shared_bert.SharedBertForSequenceClassification)
    args = FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=1e-5, head_learning_rate=1e-3)
    args.eval_strategy = "no"
    optimizer = FinetuningTrainer(model=model, args=args).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == (1e-3 if name.startswith("classifier") else 1e-5)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.classifier.weight)] == 0.01
    assert decays[id(model.classifier.bias)] == 0


def test_real_lengths_are_measured_against_padding(saved, glue, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "benchmark.py"))["main"]
    output = tmp_path / "finetune.json"
    options = ["--model", saved("bert"), "--data_dir", str(glue), "--rounds", "2", "--rows", "8", "--max_length", "16"]
    assert main(["finetune", *options, "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["results"]
    assert row["rows"] == 8
    assert row["speedup"] == row["seconds_per_epoch"]["padded"] / row["seconds_per_epoch"]["real_lengths"]
    assert set(row["scores"]) == {"padded", "real_lengths"}
    assert f"speedup {row['speedup']:.2f}x" in capsys.readouterr().out
