"""What a card says is what was pushed, and its code runs."""

import json
import re

import pytest
import yaml
from datasets import Dataset

import shared_bert
from shared_bert.data.tasks import GLUE
from shared_bert.training import FinetuningArguments, finetune

from ..conftest import tiny_model
from ..far_side import WITHOUT_PACKAGE
from .conftest import CLASSES, REPO
from .own_model import OwnModel


def test_a_class_of_ones_own(hub, saved):
    model, _ = saved("bert", OwnModel)
    model.push_to_hub(REPO)
    files = hub.repositories[REPO].files()
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForMaskedLM"] == "own_model.OwnModel"
    # Its own code, and what it and the other names in `auto_map` stand on.
    assert {"own_model.py", "modeling_shared_bert.py", "attention.py", "README.md"} <= set(files)
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n", 2)[1])["pipeline_tag"] == "fill-mask"
    assert "`OwnModel` is not a class of the package" in card


def test_a_fine_tuned_model_does_not_take_over_results(hub, saved):
    _, folder = saved("bert")
    tuned = shared_bert.SharedBertForSequenceClassification.from_pretrained(folder, num_labels=3)
    tuned.push_to_hub(REPO)
    files = hub.repositories[REPO].files()
    assert "model-index" not in files["README.md"].decode()
    assert "eval_results.json" not in files
    assert "tokenizer.json" in files


def test_without_a_tokenizer_the_card_loads_none(hub):
    tiny_model("bert").push_to_hub(REPO)
    card = hub.repositories[REPO].files()["README.md"].decode()
    assert "AutoTokenizer" not in card
    assert f'AutoModelForMaskedLM.from_pretrained("{REPO}", trust_remote_code=True)' in card


@pytest.mark.parametrize("name", ["eval_results.json", "train_results.json", "trainer_state.json", "run.json"])
@pytest.mark.parametrize("content", ['{"eval_loss": 1', "[1]"])
def test_damaged_metrics_are_named(hub, saved, name, content):
    model, folder = saved("bert")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        model.push_to_hub(REPO, source=folder)
    assert REPO not in hub.repositories


def test_somebodys_own_card_stays(hub, saved):
    model, _ = saved("bert")
    model.push_to_hub(REPO)
    hub.repositories[REPO].files()["README.md"] = b"---\nlicense: mit\n---\n# mine\n"
    model.push_to_hub(REPO)
    assert hub.repositories[REPO].files()["README.md"].endswith(b"# mine\n")


def test_healing_is_no_result(hub, saved):
    model, folder = saved("bert")
    record = {
        "kind": "healing", "data": {"train_file": "/home/me/secret/text.txt"}, "block_size": 32, "tokens_per_step": 64,
        "training": {"max_steps": 5, "num_train_epochs": 3.0}, "versions": {"torch": "2"},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "conversion.json").write_text(json.dumps({"model": "/home/me/secret"}))
    model.push_to_hub(REPO, source=folder)
    files = hub.repositories[REPO].files()
    card = files["README.md"].decode()
    assert "model-index" not in card
    assert "Healing on local text (`text.txt`)" in card
    assert "| distance from the original (see `HealingTrainer`) | 2.5 |" in card
    assert not any(b"secret" in content for content in files.values())


def test_fine_tuning_is_a_result(hub, saved, tokenizers, tmp_path):
    _, folder = saved("bert")
    rows = Dataset.from_dict({"sentence": ["the fox hunts", "the dog barks"] * 4, "label": [0, 1] * 4})
    args = FinetuningArguments(output_dir=str(tmp_path / "tuned"), num_train_epochs=1, use_cpu=True, disable_tqdm=True)
    data = {"dataset_name": "nyu-mll/glue", "dataset_config_name": "sst2"}
    splits = {"train": rows, "validation": rows}
    finetune(str(folder), tokenizers["bert"], GLUE["sst2"], splits, args, max_length=16, data=data)
    tuned = shared_bert.SharedBertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    tuned.push_to_hub(REPO, source=tmp_path / "tuned")
    _, head, text = hub.repositories[REPO].files()["README.md"].decode().split("---\n", 2)
    (entry,) = yaml.safe_load(head)["model-index"]
    (result,) = entry["results"]
    assert result["task"]["type"] == "text-classification"
    assert (result["dataset"]["type"], result["dataset"]["config"]) == ("nyu-mll/glue", "sst2")
    evaluation = json.loads((tmp_path / "tuned" / "eval_results.json").read_text())
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics == {"accuracy": evaluation["eval_accuracy"], "loss": evaluation["eval_loss"]}
    assert "Fine-tuning on `nyu-mll/glue` (sst2).\n- 1 steps.\n" in text
    assert f"| accuracy | {evaluation['eval_accuracy']:.4g} |" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_code_on_the_card_runs(hub, far, saved, kind):
    model, folder = saved(kind, attention_scheme="unified")
    model.push_to_hub(REPO, source=folder)
    with_package, without = re.findall(
        r"```python\n(.*?)```", hub.repositories[REPO].files()["README.md"].decode(), flags=re.DOTALL
    )
    for code in (with_package, WITHOUT_PACKAGE + without):
        process = far("-c", code + "print(type(model).__name__, type(tokenizer).__name__)")
        assert process.stdout.split()[-2:] == [type(model).__name__, CLASSES[kind][1]], process.stderr


def test_the_card_says_what_the_model_is(hub, saved):
    model, folder = saved("bert", attention_scheme="shared", depth_sharing="masa", num_atoms=1)
    model.push_to_hub(REPO, source=folder)
    card = hub.repositories[REPO].files()["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["pipeline_tag"] == "fill-mask"
    assert data["library_name"] == "transformers"
    assert {"shared_bert", "shared", "masa"} <= set(data["tags"])
    (entry,) = data["model-index"]
    metrics = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert metrics == {"loss": 2.5, "accuracy": 0.25}
    standard = shared_bert.SharedBertForMaskedLM(model.config.with_attention())
    assert f"| whole model | {model.num_parameters():,} | {standard.num_parameters():,} |" in text
    for section in ("Intended use", "What is shared", "Data and budget", "Results", "Limits", "How to load it"):
        assert f"## {section}" in text
    assert f'AutoModelForMaskedLM.from_pretrained("{REPO}")' in text
    assert f'AutoModelForMaskedLM.from_pretrained("{REPO}", trust_remote_code=True)' in text


@pytest.mark.parametrize("cls", [*shared_bert.conversion.families.STOCK_CLASSES])
def test_every_class_has_a_card(hub, cls):
    kind = "bert" if cls.config_class is shared_bert.SharedBertConfig else "gpt"
    tiny_model(kind, cls).push_to_hub(REPO)
    files = hub.repositories[REPO].files()
    auto = next(auto for auto, name in cls.config_class.auto_classes.items() if name == cls.__name__)
    assert f"{auto}.from_pretrained(" in files["README.md"].decode()
    assert json.loads(files["config.json"])["auto_map"][auto].endswith(f".{cls.__name__}")
