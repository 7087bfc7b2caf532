"""The stock `Trainer` fine-tunes these models, saves them and goes through checkpoints as it does with its own."""

import dataclasses

import pytest
import torch
from transformers import Trainer, TrainingArguments

import shared_bert

from ..conftest import tiny_model

CLASSES = {"bert": shared_bert.SharedBertForSequenceClassification, "gpt": shared_bert.SharedGptForCausalLM}
pytest.importorskip("accelerate", reason="needs the package accelerate")


def rows(kind):
    """Sequences that begin with the number of their class: what a classifier, or the next token, can learn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 20, (32, 12), generator=generator)
    ids[:, :6] = 30 + (torch.arange(32) % 2)[:, None]
    if kind == "bert":
        return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(ids)]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(kind, folder, model=None, **arguments):
    model = model or tiny_model(kind, CLASSES[kind], num_labels=2)
    arguments = TrainingArguments(
        folder,
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=10,
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(kind))
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_falls_and_the_checkpoint_is_the_model(kind, tmp_path):
    trainer, losses = train(kind, tmp_path)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    loaded = CLASSES[kind].from_pretrained(tmp_path / "checkpoint-20")
    expected = trainer.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("depth_sharing", [{}, {"depth_sharing": "masa", "num_atoms": 1}])
def test_gradient_checkpointing_trains_the_same(kind, depth_sharing, tmp_path):
    def losses(**arguments):
        model = tiny_model(kind, CLASSES[kind], num_labels=2, **depth_sharing)
        return train(kind, tmp_path, model, save_strategy="no", **arguments)[1]

    # transformers 5.17 knows the older name only.
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    assert losses(**{name: True}) == pytest.approx(losses(), rel=1e-4)


def test_evaluation_is_the_models_own_loss(kind, tmp_path):
    model = tiny_model(kind, CLASSES[kind], num_labels=2)
    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=32, use_cpu=True, disable_tqdm=True)
    metrics = Trainer(model, arguments, eval_dataset=rows(kind)).evaluate()
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows(kind)])
    logits = model(torch.stack([row["input_ids"] for row in rows(kind)])).logits
    if kind == "gpt":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
