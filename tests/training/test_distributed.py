"""Two processes on CPUs train as one does."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ..processes import launcher_environment
from .runs import MASA, SCRIPT, SHAPE, losses, run, write_recipe

pytestmark = pytest.mark.slow

NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
MASA_NETWORK = {**MASA, "coefficient_source": "network"}
AUTO_CLASSES = {"shared_bert": AutoModelForMaskedLM, "shared_gpt": AutoModelForCausalLM}


def launch(launcher, path, *options):
    environment = {} if launcher == "torchrun" else launcher_environment(launcher)
    options = ["--per_device_train_batch_size", "4", *options]
    process = run(SCRIPT, path, *options, processes=2, **environment)
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.parametrize(
    ("launcher", "model_type", "fields"),
    [
        ("torchrun", "shared_bert", SHAPE),
        ("ddp_2cpu.yaml", "shared_gpt", MASA_NETWORK),
        ("fsdp2_2cpu.yaml", "shared_bert", MASA_NETWORK),
        ("fsdp2_2cpu.yaml", "shared_gpt", SHAPE),
    ],
    ids=lambda value: value.get("depth_sharing", "none") if isinstance(value, dict) else value,
)
def test_two_processes_train_as_one(tmp_path, launcher, model_type, fields):
    # Several epochs. Accelerate fills an incomplete last batch up with other rows, where there are several processes.
    path = write_recipe(
        tmp_path, model_type=model_type, config_overrides=fields | NO_DROPOUT, max_train_samples=9,
        dataloader_drop_last=True, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    single = run(SCRIPT, path, "--output_dir", tmp_path / "single", "--per_device_eval_batch_size", "8")
    assert single.returncode == 0, single.stderr
    launch(launcher, path)
    output_dir = tmp_path / "run"
    curve = losses(output_dir)
    assert curve == pytest.approx(losses(tmp_path / "single"), abs=1e-4)

    # FSDP saves its optimizer under a name of its own; without this check DDP in its place would go unnoticed.
    assert (output_dir / "checkpoint-10" / "optimizer.bin").exists() == launcher.startswith("fsdp")
    for folder in (output_dir / "checkpoint-10", output_dir):
        model, info = AUTO_CLASSES[model_type].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    reference = AUTO_CLASSES[model_type].from_pretrained(tmp_path / "single")
    assert type(model) is type(reference)
    assert model.config.architectures == reference.config.architectures
    assert model.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-3, rtol=0)

    # Resumed in the middle of an epoch that is not the first.
    shutil.rmtree(output_dir / "checkpoint-10")
    epoch = json.loads((output_dir / "checkpoint-5" / "trainer_state.json").read_text())["epoch"]
    assert epoch > 1
    assert epoch % 1
    launch(launcher, path, "--resume_from_checkpoint", "true")
    assert losses(output_dir) == pytest.approx(curve, rel=1e-4)
    resumed = AUTO_CLASSES[model_type].from_pretrained(output_dir).state_dict()
    assert resumed.keys() == reference.state_dict().keys()
