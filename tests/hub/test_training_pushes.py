"""What is pushed while a model is trained can be loaded by anybody, as what is pushed at its end."""

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from ..conftest import tiny_model
from ..training.runs import SCRIPT, write_recipe
from .conftest import REPO
from .hub_double import TOKEN
from .test_push import load_remotely, logits_of

pytestmark = pytest.mark.slow
PICKLES = (".bin", ".pt", ".pth", ".pkl")
# A stock Trainer whose pushes are whole.
STOCK_TRAINER = """
import sys, torch
from transformers import AutoTokenizer, Trainer, TrainingArguments
import shared_bert
from shared_bert.hub import CheckpointPushes

class PushingTrainer(CheckpointPushes, Trainer):
    pass

model = shared_bert.SharedBertForMaskedLM.from_pretrained(sys.argv[1])
rows = [{"input_ids": torch.arange(8) + 5, "labels": torch.arange(8) + 5}] * 8
options = TrainingArguments("trained", max_steps=2, save_steps=1, push_to_hub=True, hub_model_id=sys.argv[2],
    hub_strategy="all_checkpoints", hub_token=sys.argv[3], use_cpu=True)
trainer = PushingTrainer(model, options, train_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]))
trainer.train()
trainer.push_to_hub()
"""


@pytest.fixture
def trained(hub, far, tmp_path):
    def trained(**changes):
        path = write_recipe(
            tmp_path, max_steps=4, save_steps=2, save_total_limit=1, push_to_hub=True, hub_model_id=REPO,
            eval_strategy="steps", eval_steps=2, **changes,
        )  # fmt: skip
        return far(SCRIPT, path, token=TOKEN)

    return trained


def test_every_push_has_all(trained, hub, far, tmp_path):
    process = trained(hub_strategy="all_checkpoints")
    assert process.returncode == 0, process.stderr
    repository = hub.repositories[REPO]
    assert set(repository.branches) == {"main", "step-2", "step-4"}
    assert repository.messages[1:] == [
        *["Training in progress, step 2"] * 2, *["Training in progress, step 4"] * 2, "End of training",
    ]  # fmt: skip
    commits = [files for files in repository.commits.values() if "config.json" in files]
    assert len(commits) == 5
    for files in commits:
        assert {"README.md", "modeling_shared_bert.py", "tokenizer.json", "model.safetensors"} <= set(files)
        assert not [name for name in files if name.endswith(PICKLES)]
    card = repository.files()["README.md"].decode()
    assert "4 steps of 256 tokens: 1,024 tokens." in card
    assert "Pre-training on local text (`text.txt`), in rows of 32 tokens." in card
    assert "- type: perplexity" in card
    assert "eval_results.json" in repository.files()

    # The first checkpoint is no longer on this machine, but on the Hub.
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    first, last = (load_remotely(far, "bert", revision=name, trust_remote_code=True)[1] for name in ("step-2", "main"))
    local = logits_of(AutoModelForMaskedLM.from_pretrained(tmp_path / "run"), tmp_path / "run")
    torch.testing.assert_close(last, local)
    assert (first - last).abs().max() > 1e-3

    for stream in (process.stdout, process.stderr):
        assert TOKEN not in stream
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert_no_token(hub)


def assert_no_token(hub):
    for repository in hub.repositories.values():
        for files in repository.commits.values():
            assert not [name for name, content in files.items() if TOKEN.encode() in content]


def test_a_token_among_the_options_is_not_saved(trained, hub, tmp_path):
    # TrainingArguments are pickled into every checkpoint.
    process = trained(hub_token=TOKEN)
    assert process.returncode == 0, process.stderr
    saved = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in saved if path.name == "training_args.bin"]
    for path in saved:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_a_run_can_go_on_from_the_hub(trained, hub):
    assert trained(hub_strategy="checkpoint").returncode == 0
    names = [name for name in hub.repositories[REPO].files() if name.startswith("last-checkpoint/")]
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(names)
    assert "last-checkpoint/training_args.bin" not in names


def test_training_survives_a_hub_that_refuses(trained, hub, tmp_path):
    with hub.fault("POST .*/commit/", 403):
        process = trained()
    assert "the push to somebody/model failed" in process.stderr
    assert "nothing was committed" in process.stderr
    assert process.returncode != 0  # the last push failed too, after the model was saved
    AutoModelForMaskedLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")


def test_stock_trainer(hub, far, tokenizers, tmp_path):
    tiny_model("bert", vocab_size=320).save_pretrained(tmp_path / "start")
    tokenizers["bert"].save_pretrained(tmp_path / "start")
    process = far("-c", STOCK_TRAINER, tmp_path / "start", REPO, TOKEN)
    assert process.returncode == 0, process.stderr
    repository = hub.repositories[REPO]
    assert set(repository.branches) == {"main", "step-1", "step-2"}
    for branch in repository.branches:
        files = repository.files(branch)
        assert {"README.md", "modeling_shared_bert.py", "config.json", "tokenizer.json"} <= set(files)
        assert b"What is shared" in files["README.md"]
        assert not [name for name in files if name.endswith(PICKLES)]
    assert_no_token(hub)
    model_class, _ = load_remotely(far, "bert", trust_remote_code=True)
    assert model_class == "SharedBertForMaskedLM"
