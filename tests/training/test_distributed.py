"""Two processes on CPUs train as one does."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from .runs import ROOT, SCRIPT, SHAPE, losses, run, write_recipe

pytestmark = pytest.mark.slow

NO_DROPOUT = {**SHAPE, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
AUTO_CLASSES = {"shared_bert": AutoModelForMaskedLM, "shared_gpt": AutoModelForCausalLM}


def launch(launcher, path, *options):
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        command = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate" / launcher]
    process = run(*command, SCRIPT, path, "--per_device_train_batch_size", "4", *options)
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.parametrize(
    ("launcher", "model_type"),
    [
        ("torchrun", "shared_bert"),
        ("ddp_2cpu.yaml", "shared_gpt"),
        ("fsdp2_2cpu.yaml", "shared_gpt"),
        ("fsdp2_2cpu.yaml", "shared_bert"),
    ],
)
def test_two_processes_train_as_one(tmp_path, launcher, model_type):
    # Several epochs. Accelerate fills an incomplete last batch up with other rows, where there are several processes.
    path = write_recipe(
        tmp_path, model_type=model_type, config_overrides=NO_DROPOUT, max_train_samples=9, dataloader_drop_last=True,
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    single = run(SCRIPT, path, "--output_dir", tmp_path / "single", "--per_device_eval_batch_size", "8")
    assert single.returncode == 0, single.stderr
    launch(launcher, path)
    output_dir = tmp_path / "run"
    curve = losses(output_dir)
    assert curve == pytest.approx(losses(tmp_path / "single"), abs=1e-4)

    # FSDP saves its optimizer under a name of its own; without this check DDP in its place would go unnoticed.
    assert (output_dir / "checkpoint-10" / "optimizer.bin").exists() == launcher.startswith("fsdp")
    for folder in (output_dir, output_dir / "checkpoint-10"):
        model, info = AUTO_CLASSES[model_type].from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    reference = AUTO_CLASSES[model_type].from_pretrained(tmp_path / "single")
    assert type(model) is type(reference)
    assert model.config.architectures == reference.config.architectures
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=1e-3, rtol=0)

    # Resumed in the middle of an epoch that is not the first.
    shutil.rmtree(output_dir / "checkpoint-10")
    epoch = json.loads((output_dir / "checkpoint-5" / "trainer_state.json").read_text())["epoch"]
    assert epoch > 1
    assert epoch % 1
    launch(launcher, path, "--resume_from_checkpoint", "true")
    assert losses(output_dir) == curve
