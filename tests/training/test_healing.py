"""Healing: the loss is the stated one, it falls, the teacher stays, and a killed run goes on."""

import signal

import pytest
import torch
from safetensors.torch import load_file

import shared_bert
from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.data import load_documents, train_tokenizer
from shared_bert.training import DataArguments, PretrainingArguments, heal
from shared_bert.training.healing import HealingTrainer, healing_loss

from ..conftest import tiny_model
from .runs import KILLED_HEALING, ROOT, losses, run, write_text

# The newer and the older name of one option of transformers.
NEW_NAME = "activation_checkpointing"
CHECKPOINTING = NEW_NAME if NEW_NAME in PretrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
KINDS = {"shared_bert": ("bert", "wordpiece"), "shared_gpt": ("gpt", "byte_bpe")}


def pair(cls, **fields):
    """A stock teacher and a student of another scheme with all but its attention."""
    kind, _ = KINDS[cls.config_class.model_type]
    fields = {"vocab_size": 320, "initializer_range": 0.1, "hidden_dropout_prob": 0.1, **fields}
    teacher = tiny_model(kind, cls, attention_scheme="standard", attention_bias=True, **fields)
    student = tiny_model(kind, cls, attention_scheme="shared_kv", attention_bias=True, **fields)
    student.load_state_dict({k: v for k, v in teacher.state_dict().items() if "projection" not in k}, strict=False)
    return student, shared_bert.to_stock(teacher)


def heal_here(folder, student, teacher, data=None, **arguments):
    file = write_text(folder / "text.txt")
    data = DataArguments(
        **{"train_file": str(file), "sample_by": "line", "validation_split": 0.1, "block_size": 32, **(data or {})}
    )
    documents = load_documents(train_file=str(file), sample_by="line")["train"]
    tokenizer = train_tokenizer(KINDS[student.config.model_type][1], documents, 320, model_max_length=32)
    options = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"output_dir": str(folder / "run"), "use_cpu": True, "disable_tqdm": True, "save_steps": 100}
    return heal(student, teacher, tokenizer, data, PretrainingArguments(**(options | arguments)))


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_loss_is_the_literal_one(tmp_path, kind, input_ids):
    teacher = tiny_model(kind, attention_scheme="standard").double()
    student = tiny_model(kind, attention_scheme="unified", hidden_dropout_prob=0.5).double().train()
    document_ids = torch.zeros_like(input_ids)
    document_ids[1, 5:], document_ids[1, 9:] = 1, -1
    arguments = PretrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    inputs = {"input_ids": input_ids, "document_ids": document_ids}
    loss = HealingTrainer(model=student, teacher=teacher, args=arguments).compute_loss(student, inputs)

    expected = 0.0
    options = {"document_ids": document_ids, "output_hidden_states": True}
    mine, theirs = (model.eval()(input_ids, **options) for model in (student, teacher))
    tokens = [(0, i) for i in range(12)] + [(1, i) for i in range(9)]
    for layer in (1, 2):
        difference = sum(
            (mine.hidden_states[layer][t] - theirs.hidden_states[layer][t]).square().sum() for t in tokens
        )
        expected += difference / sum(theirs.hidden_states[layer][t].square().sum() for t in tokens) / 2
    for token in tokens:
        p, q = theirs.logits[token].softmax(0), mine.logits[token].softmax(0)
        expected += (p * (p / q).log()).sum() / len(tokens)
    assert expected > 0.01
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cls", STOCK_CLASSES)
def test_every_model_comes_closer_to_its_teacher(tmp_path, cls):
    student, teacher = pair(cls)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    kept = [n for n, _ in student.named_parameters() if "pooler" in n or n.startswith(("classifier", "qa_", "score"))]
    heads = {name: student.get_parameter(name).clone() for name in kept}
    metrics = heal_here(tmp_path, student, teacher)
    curve = losses(tmp_path / "run")
    assert metrics["eval_loss"] < curve[1] / 3
    assert "eval_perplexity" not in metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    healed = cls.from_pretrained(tmp_path / "run")
    for name, parameter in healed.named_parameters():
        assert name not in heads or torch.equal(parameter, heads[name])
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert healed.config.hidden_dropout_prob == 0.1


def test_a_model_that_is_its_teacher_has_nothing_to_learn(input_ids):
    model = tiny_model("bert")
    outputs = model(input_ids, output_hidden_states=True)
    assert healing_loss(outputs, outputs, input_ids > 0, predicts_tokens=True) == 0


def test_streaming_and_accumulation(tmp_path):
    student, teacher = pair(shared_bert.SharedBertForMaskedLM)
    metrics = heal_here(tmp_path, student, teacher, {"streaming": True}, gradient_accumulation_steps=2)
    # The loss of an accumulated step is a mean, not a sum.
    assert metrics["eval_loss"] < losses(tmp_path / "run")[1] / 3 < 1


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ({"block_size": 41}, {}, "block_size=41.*max_position_embeddings=40"),
        ({"train_file": None}, {}, "needs text.*dataset_name and train_file"),
        ({"streaming": True}, {"num_train_epochs": 1, "max_steps": -1}, "max_steps=-1"),
        ({}, {CHECKPOINTING: True}, "activation checkpointing"),
        ({}, {"resume_from_checkpoint": "true"}, "no whole checkpoint"),
    ],
)
def test_bad_arguments_cost_nothing(tmp_path, data, arguments, message):
    student, teacher = pair(shared_bert.SharedBertModel)
    with pytest.raises(ValueError, match=message):
        heal_here(tmp_path, student, teacher, data, **arguments)
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_go_together_are_refused(tmp_path):
    student, teacher = pair(shared_bert.SharedBertForMaskedLM)
    for model, other, message in (
        (student, shared_bert.to_stock(tiny_model("bert", shared_bert.SharedBertModel)), "BertModel cannot teach"),
        (student, tiny_model("bert", num_hidden_layers=3, vocab_size=320), "num_hidden_layers=2 and its teacher 3"),
        (teacher, teacher, "BertForMaskedLM cannot be healed"),
        (tiny_model("bert"), tiny_model("bert"), "tokenizer has .* tokens, but the model's vocab_size=99"),
        (pair(shared_bert.SharedBertForMaskedLM)[0].bfloat16(), teacher, "torch.bfloat16.*float32"),
    ):
        kind = type("tokenizer", (), {"__len__": lambda self: 300})()
        arguments = PretrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True)
        with pytest.raises(ValueError, match=message):
            heal(model, other, kind, DataArguments(train_file="text.txt"), arguments)
    assert not (tmp_path / "run").exists()


def test_a_model_without_head_is_refused_under_fsdp(tmp_path, monkeypatch):
    student, teacher = pair(shared_bert.SharedBertModel)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="SharedBertModel without a head cannot be healed under FSDP"):
        heal_here(tmp_path, student, teacher)


# A run of 12 steps, killed after the step that the environment names.
KILLED = """
import sys
from pathlib import Path
import shared_bert
from tests.training.test_healing import heal_here, pair

student, teacher = pair(shared_bert.SharedGptForCausalLM)
folder, resume = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(exist_ok=True)
heal_here(folder, student, teacher, max_steps=12, save_steps=5, resume_from_checkpoint=resume)
"""


@pytest.mark.slow
def test_resumption_is_exact(tmp_path):
    def heal_there(name, resume, **environment):
        return run("-c", KILLED_HEALING + KILLED, tmp_path / name, resume, PYTHONPATH=str(ROOT), **environment)

    whole = heal_there("whole", "false")
    assert whole.returncode == 0, whole.stderr
    killed = heal_there("killed", "false", KILL_AT_STEP="7")
    assert killed.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / "run"
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-5"]
    resumed = heal_there("killed", "true")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole" / "run"), rel=1e-4)
    expected = load_file(tmp_path / "whole" / "run" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    for process in (whole, resumed):
        assert "FutureWarning" not in process.stderr
        assert "DeprecationWarning" not in process.stderr
