"""Noise and cross-domain accuracy are what their definitions give, for models of this package and stock ones."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset

import shared_bert
from shared_bert.data.tasks import GLUE
from shared_bert.evaluation.robustness import cross_domain_accuracy, noise_accuracy, predict_labels

from ..conftest import tiny_model

ROOT = Path(__file__).parents[2]
TEXTS = ["the fox hunts .", "the dog barks", "the owl sees the hen .", "the cow", "the cat naps . the cow stands ."]


def rows_of(name, labels):
    task = GLUE[name]
    texts = {column: [TEXTS[(i + shift) % 5] for i in range(len(labels))] for shift, column in enumerate(task.texts)}
    return Dataset.from_dict({**texts, "label": labels}).cast_column("label", ClassLabel(names=list(task.labels)))


@pytest.fixture
def classifier(tokenizers):
    def classifier(kind, name):
        classes = {
            "bert": shared_bert.SharedBertForSequenceClassification,
            "gpt": shared_bert.SharedGptForSequenceClassification,
        }
        labels = dict(enumerate(GLUE[name].labels))
        fields = {
            "vocab_size": 320,
            "id2label": labels,
            "initializer_range": 0.5,
            "pad_token_id": tokenizers[kind].pad_token_id,
        }
        return tiny_model(kind, classes[kind], **fields), tokenizers[kind]

    return classifier


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_without_noise_it_is_the_accuracy(classifier, kind):
    model, tokenizer = classifier(kind, "mrpc")
    rows = rows_of("mrpc", [0, 1, 1, 0, 1, 0, 0])
    expected = []
    for row in rows:
        with torch.no_grad():
            encoded = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
            expected.append(model(**encoded).logits.argmax(-1).item())
    for candidate in (model, shared_bert.to_stock(model)):
        assert predict_labels(candidate, tokenizer, rows, "mrpc", batch_size=3).tolist() == expected
    (result,) = noise_accuracy(model, tokenizer, rows, "mrpc", levels=[0.0])
    assert result["accuracies"] == [sum(a == b for a, b in zip(expected, rows["label"], strict=True)) / 7]


def test_noise_has_the_stated_size(classifier):
    model, tokenizer = classifier("bert", "sst2")
    rows = rows_of("sst2", [0, 1] * 200)
    seen = []
    # The sum of the embeddings comes in here.
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for noise in (0.0, 0.3):
        predict_labels(model, tokenizer, rows, "sst2", noise=noise, batch_size=400)
    clean, noisy = seen
    lengths = (noisy - clean).norm(dim=-1)
    mean = model.get_input_embeddings().weight.norm(dim=-1).mean()
    # The mean length of isotropic noise is that of a chi distribution: a little below its root mean square.
    assert (lengths.square().mean().sqrt() / mean).item() == pytest.approx(0.3, rel=0.02)
    directions = (noisy - clean).flatten(0, 1)
    assert directions.mean(0).abs().max() < 0.1 * directions.std()
    predict_labels(model, tokenizer, rows, "sst2", batch_size=400)
    assert torch.equal(seen[-1], clean)  # no noise is left behind


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize("stock", [False, True])
def test_noise_does_not_hide_the_padding(classifier, kind, stock):
    model, tokenizer = classifier(kind, "mrpc")
    model = shared_bert.to_stock(model) if stock else model
    rows = rows_of("mrpc", [0, 1] * 20)
    expected = predict_labels(model, tokenizer, rows, "mrpc")
    assert torch.equal(predict_labels(model, tokenizer, rows, "mrpc", noise=1e-7), expected)


def test_noise_repeats_by_seed_and_draws_differ(classifier):
    model, tokenizer = classifier("bert", "sst2")
    rows = rows_of("sst2", [0, 1] * 30)
    first, again = (noise_accuracy(model, tokenizer, rows, "sst2", [0.0, 2.0], draws=5) for _ in range(2))
    assert first == again
    assert len(first[0]["accuracies"]) == 1
    assert len(set(first[1]["accuracies"])) > 1
    assert first[1]["std"] > 0


def test_labels_of_other_tasks_are_mapped(classifier):
    model, tokenizer = classifier("bert", "mnli")
    rows = {"qqp": rows_of("qqp", [0, 1, 0, 1, 1]), "rte": rows_of("rte", [0, 1, 0, 1, 1])}
    found = cross_domain_accuracy(model, tokenizer, "mnli", rows)
    for name, says_yes in (("qqp", 1), ("rte", 0)):
        predictions = predict_labels(model, tokenizer, rows[name], name).tolist()
        right = [(p == 0) == (label == says_yes) for p, label in zip(predictions, rows[name]["label"], strict=True)]
        assert found[name] == sum(right) / 5


def test_what_does_not_fit_is_refused(classifier):
    model, tokenizer = classifier("bert", "mrpc")
    with pytest.raises(ValueError, match="the head's labels are not_equivalent, equivalent, but those of rte are"):
        noise_accuracy(model, tokenizer, rows_of("rte", [0]), "rte")
    with pytest.raises(ValueError, match="stsb has no classes"):
        noise_accuracy(model, tokenizer, None, "stsb")
    with pytest.raises(ValueError, match="sst2 asks another question"):
        cross_domain_accuracy(model, tokenizer, "mrpc", {"sst2": rows_of("sst2", [0])})
    with pytest.raises(ValueError, match="draws=0 must be at least 1"):
        noise_accuracy(model, tokenizer, rows_of("mrpc", [0]), "mrpc", draws=0)


def test_the_script(classifier, tokenizers, tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]
    model, tokenizer = classifier("bert", "mrpc")
    decoder = tiny_model("gpt", vocab_size=320)
    for saved, of_model, name in ((model, tokenizer, "classifier"), (decoder, tokenizers["gpt"], "decoder")):
        saved.save_pretrained(tmp_path / name)
        of_model.save_pretrained(tmp_path / name)
    for name in ("mrpc", "rte"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            rows_of(name, [0, 1, 1]).to_parquet(tmp_path / "glue" / name / f"{split}.parquet")
    (tmp_path / "text.txt").write_text("the fox hunts . the dog barks .")
    pair = {"sentence_good": "the fox hunts", "sentence_bad": "fox the hunts", "UID": "a", "linguistics_term": "x"}
    Dataset.from_list([pair] * 4).to_parquet(tmp_path / "pairs.parquet")
    task = ["--task", "mrpc", "--data_dir", str(tmp_path / "glue")]

    def run(command, model, *options):
        output = tmp_path / f"{command}.json"
        assert main([command, "--model", str(tmp_path / model), "--output", str(output), *options]) == 0
        return json.loads(output.read_text())["results"][str(tmp_path / model)]

    assert [row["level"] for row in run("noise", "classifier", *task, "--levels", "0", "0.2")] == [0, 0.2]
    assert (tmp_path / "noise.png").stat().st_size > 0
    # An earlier output stands for its models.
    kept = json.loads((tmp_path / "noise.json").read_text())["results"]
    joined = ["noise", "--model", str(tmp_path / "noise.json"), "--output", str(tmp_path / "joined.json"), *task]
    assert main([*joined, "--levels", "0", "0.2"]) == 0
    assert json.loads((tmp_path / "joined.json").read_text())["results"] == kept
    assert main([*joined, "--levels", "0", "0.3"]) == 2
    assert "noise.json was measured with levels=[0.0, 0.2], not [0.0, 0.3]" in capsys.readouterr().err
    alone = run("cross_domain", "classifier", *task, "--on", "rte")
    assert set(alone) == {"rte"}
    # The output folder of fine-tuning stands for the models of all seeds.
    for seed in (0, 1):
        shutil.copytree(tmp_path / "classifier", tmp_path / "tuned" / "mrpc" / f"seed-{seed}")
    both = run("cross_domain", "tuned", *task, "--on", "rte")
    assert both["rte"] == {"accuracies": 2 * alone["rte"]["accuracies"], "mean": alone["rte"]["mean"], "std": 0.0}
    noisy = run("noise", "tuned", *task, "--levels", "0", "0.2", "--draws", "2")
    assert [len(row["accuracies"]) for row in noisy] == [2, 2]
    assert (
        run("blimp", "decoder", "--pairs", str(tmp_path / "pairs.parquet"), "--max_pairs", "3")["overall"]["pairs"]
        == 3
    )
    assert run("perplexity", "decoder", "--text", str(tmp_path / "text.txt"))["words"] == 8
    assert main(["noise", "--model", "any", "--task", "mprc"]) == 2
    assert "the nearest is 'mrpc'" in capsys.readouterr().err
