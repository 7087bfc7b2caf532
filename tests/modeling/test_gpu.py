"""What only a GPU can show: its attention kernels agree with the literal one, packed and padded."""

import importlib.util

import pytest
import torch

from shared_bert.modeling import losses
from tests.conftest import learns_in_bfloat16, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
FLASH = "flash_attention_2"


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", FLASH])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_agree_with_eager(kind, scheme, implementation, packed):
    if implementation == FLASH and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    model = tiny_model(kind, attention_scheme=scheme, hidden_size=128, max_position_embeddings=128)
    input_ids = torch.randint(3, 99, (3, 96), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([96, 64, 33])[:, None]
    inside = torch.arange(96)[None] < lengths
    if packed:
        inputs = {"document_ids": torch.where(inside, torch.arange(96)[None] // 29, -1)}
    else:
        inputs = {"attention_mask": inside.long()}

    def logits(device, dtype, implementation):
        model.to(device, dtype).set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(input_ids.to(device), **{name: value.to(device) for name, value in inputs.items()})
        return out.logits.float().cpu()[inside]

    expected = logits("cpu", torch.float32, "eager")
    # bfloat16 keeps 8 bits; the logits of these models are below 1.
    torch.testing.assert_close(logits("cuda", torch.bfloat16, implementation), expected, rtol=0.05, atol=0.03)


MASA = {"depth_sharing": "masa", "num_atoms": 1, "depth_shared_matrices": "qkvo", "coefficient_source": "network"}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fields", [{}, MASA], ids=["own", "masa"])
def test_training_in_bfloat16_learns(kind, compiled, fields):
    input_ids = torch.randint(3, 99, (8, 32), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": input_ids, "labels": input_ids}
    if kind == "bert":
        inputs["num_predictions"] = input_ids.numel()
    assert learns_in_bfloat16(tiny_model(kind, **fields), inputs, compiled, steps=60)


def test_the_loss_in_pieces_is_the_cross_entropy(monkeypatch):
    monkeypatch.setitem(losses.MAX_LOGITS, "other", 1000 * 7)
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 1000, device="cuda")
    hidden = torch.randn(32, 64, device="cuda", requires_grad=True)
    labels = torch.randint(1000, (32,), device="cuda").masked_fill(torch.arange(32, device="cuda") % 3 == 0, -100)
    inputs = hidden, *head.parameters()
    with torch.autocast("cuda", torch.bfloat16):
        got = losses.linear_cross_entropy(hidden, head, labels)
    expected = torch.nn.functional.cross_entropy(head(hidden), labels)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in (got, expected)), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 0.02 * other.norm()
