"""A stock model that shares is healed by distillation, with any head over text."""

import json

import pytest
import torch
import transformers

import shared_bert
from shared_bert.data import load_documents, train_tokenizer
from shared_bert.training import DataArguments, PretrainingArguments, heal
from shared_bert.training.throughput import training_flops_per_token

from ..training.runs import write_text
from .architectures import ARCHITECTURES


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of sentences, and a tokenizer of 300 tokens."""
    file = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    documents = load_documents(train_file=str(file), sample_by="line")["train"]
    return file, train_tokenizer("byte_bpe", documents, 300, model_max_length=32)


def heal_here(folder, text, student, teacher, **arguments):
    file, tokenizer = text
    data = DataArguments(train_file=str(file), sample_by="line", validation_split=0.1, block_size=32)
    options = {"max_steps": 25, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "logging_steps": 5}
    options |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "save_steps": 100}
    return heal(student, teacher, tokenizer, data, PretrainingArguments(**(options | arguments)))


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("llama", "ForCausalLM"),
        ("qwen3", "ForSequenceClassification"),
        ("bert", "ForMaskedLM"),
        ("bert", "ForMultipleChoice"),
        ("gpt2", "LMHeadModel"),
        ("modernbert", "ForTokenClassification"),
    ],
)
def test_every_head(tmp_path, text, architecture, head):
    row = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    name = row.config.removesuffix("Config") + head
    teacher = getattr(transformers, name)(getattr(transformers, row.config)(**row.fields | {"vocab_size": 320}))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student, _ = shared_bert.share(teacher, depth_sharing="masa", num_atoms=1)
    heal_here(tmp_path, text, student, teacher)
    losses = [log["loss"] for log in _logs(tmp_path) if "loss" in log]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    loaded = type(student).from_pretrained(tmp_path)
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def _logs(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_network_of_coefficients_is_replaced_when_training_ends(tmp_path, text):
    teacher = ARCHITECTURES["llama"].model(vocab_size=320)
    student, _ = shared_bert.share(
        teacher, depth_sharing="masa", num_atoms=2, coefficient_source="network", initialize=True
    )
    heal_here(tmp_path, text, student, teacher, max_steps=3)
    loaded = type(student).from_pretrained(tmp_path)
    assert loaded.config.quantization_config.coefficient_source == "direct"
    expected = student.model.shared_matrices["q0"].layer_coefficients()
    torch.testing.assert_close(loaded.model.shared_matrices["q0"].coefficients, expected)


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("vit", "ViTForImageClassification cannot be healed: it does not read plain text"),
        ("t5", "does not read plain"),
    ],
)
def test_what_does_not_read_text(tmp_path, text, architecture, said):
    teacher = ARCHITECTURES[architecture].model()
    student, _ = shared_bert.share(teacher, depth_sharing="masa", num_atoms=2)
    with pytest.raises(ValueError, match=said):
        heal_here(tmp_path / "run", text, student, teacher)
    assert not (tmp_path / "run").exists()


def test_work_per_token_is_that_of_the_stock_model(llama):
    """Shared matrices multiply every token as the stock ones do."""
    expected = training_flops_per_token(llama, 16)
    for options in ({"depth_sharing": "masa", "num_atoms": 2}, {"depth_sharing": "sequential", "num_groups": 2}):
        model, _ = shared_bert.share(llama, depth_shared_matrices="qkvo", **options)
        assert training_flops_per_token(model, 16) == expected
