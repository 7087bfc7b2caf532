"""Two processes on CPUs train a model that shares as one does."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..processes import launcher_environment, run_python
from .conftest import SHARED

pytestmark = pytest.mark.slow

CODE = """
import json, sys
import torch
from transformers import TrainingArguments
import shared_bert
from shared_bert.training.trainer import SafeTrainer
from tests.injection.architectures import ARCHITECTURES

folder, batch_size, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.manual_seed(0)
model, _ = shared_bert.share(ARCHITECTURES["llama"].model(num_key_value_heads=4), **options)
rows = torch.randint(3, 96, (16, 8), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in rows]
args = TrainingArguments(
    folder, max_steps=4, per_device_train_batch_size=batch_size, learning_rate=1e-2, use_cpu=True, disable_tqdm=True,
    save_strategy="no", train_sampling_strategy="sequential",
)
trainer = SafeTrainer(model, args, train_dataset=rows)
trainer.train()
trainer.save_model()
"""


@pytest.mark.parametrize("sharing", ["masa", "shared, sequential"])
@pytest.mark.parametrize("launcher", ["ddp_2cpu.yaml", "fsdp2_2cpu.yaml"])
def test_two_processes_train_as_one(tmp_path, launcher, sharing):
    options = json.dumps(SHARED[sharing])
    single = run_python("-c", CODE, tmp_path / "single", "8", options)
    assert single.returncode == 0, single.stderr
    environment = {**os.environ, **launcher_environment(launcher)}
    both = run_python("-c", CODE, tmp_path / "both", "4", options, environment=environment, processes=2)
    assert both.returncode == 0, both.stderr
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "single").state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "both").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3)
