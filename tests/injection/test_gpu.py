"""Sharing in stock models on a GPU: the fits of the CPU, training in bfloat16, decoding, and multiplying out."""

import pytest
import torch

import shared_bert

from ..conftest import learns_in_bfloat16
from .architectures import ARCHITECTURES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

FITS = {
    "masa": {"depth_sharing": "masa", "num_atoms": 2, "rank": 2, "depth_shared_matrices": "qkvo"},
    "low_rank": {"depth_sharing": "low_rank", "rank": 4, "spread_rank": True},
    "sequential": {"depth_sharing": "sequential", "num_groups": 2},
    "shared_kv": {"attention_scheme": "shared_kv"},
    "pairwise": {"attention_scheme": "pairwise"},
}


@pytest.mark.parametrize("fit", FITS)
def test_fits_and_outputs_agree_with_the_cpu(llama, inputs, fit):
    ids = torch.randint(3, 96, (12, 12), generator=torch.Generator().manual_seed(2))
    expected, report = shared_bert.share(llama, calibration=[{"input_ids": ids}], **FITS[fit])
    # llama is of the whole session, and its device is changed in place.
    on_gpu = ARCHITECTURES["llama"].model(num_key_value_heads=4)
    on_gpu.load_state_dict(llama.state_dict())
    on_gpu.cuda()
    batch = {name: value.cuda() for name, value in inputs.items()}
    found, report_of_gpu = shared_bert.share(on_gpu, calibration=[{"input_ids": ids.cuda()}], **FITS[fit])
    assert found.device.type == "cuda"
    assert report_of_gpu.parameters_after == report.parameters_after
    for target, errors in report.errors.items():
        assert report_of_gpu.errors[target] == pytest.approx(errors, abs=1e-3)
    with torch.no_grad():
        logits = found(**batch).logits
        torch.testing.assert_close(logits.cpu(), expected(**inputs).logits, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(found.dequantize()(**batch).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bfloat16_learns(shared, inputs, compiled):
    assert learns_in_bfloat16(shared, inputs, compiled, steps=40)


def test_static_cache_generates_the_same(shared, inputs):
    model, prompt = shared.cuda(), inputs["input_ids"].cuda()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), expected)
