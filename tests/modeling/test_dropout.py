"""Dropout on a CPU is dropout: its share of zeros, its mean, its gradient, and nothing where there is none."""

import pytest
import torch

from shared_bert.modeling.dropout import Dropout, Noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_zeros_and_scale(probability, dtype):
    torch.manual_seed(0)
    dropped = Dropout(probability)(torch.ones(1000, 1001, dtype=dtype))
    assert dropped.dtype == dtype
    share = (dropped == 0).double().mean().item()
    assert share == pytest.approx(probability, abs=5 * (probability * (1 - probability) / 1001000) ** 0.5)
    kept = dropped[dropped != 0].double()
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - probability)), rtol=1e-2, atol=0)
    # No pattern in rows, columns or neighbours.
    zeros = (dropped == 0).double() - share
    for other in (zeros.roll(1, 1), zeros.roll(4, 1), zeros.roll(1, 0)):
        assert (zeros * other).mean().abs() < 5e-3 * probability * (1 - probability)


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 2])
def test_the_rounded_probability_is_exact(seed):
    """The zeros of all 2¹⁶ possible draws are counted in the threshold, so the scale has no bias."""
    noise = Noise(0.1, seed)
    zeros = noise.threshold + 2**15
    assert zeros == 6554
    assert noise.scale == 2**16 / (2**16 - zeros)
    torch.testing.assert_close(Noise(0.1, seed).draw((3, 5), torch.float32), noise.draw((3, 5), torch.float32))


def test_the_gradient_has_the_noise_of_the_forward_pass():
    torch.manual_seed(0)
    inputs = torch.randn(50, 40, requires_grad=True)
    dropped = Dropout(0.3)(inputs)
    factors = dropped.detach() / inputs.detach()
    upstream = torch.randn(50, 40)
    (gradient,) = torch.autograd.grad(dropped, inputs, upstream)
    torch.testing.assert_close(gradient, upstream * factors)


def test_torch_decides_about_the_noise():
    inputs = torch.ones(100)
    torch.manual_seed(3)
    first, second = Dropout(0.5)(inputs), Dropout(0.5)(inputs)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.5)(inputs), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 1.0), (0.999999, 0.0), (1.0, 0.0)])
def test_ends(probability, expected):
    assert torch.equal(Dropout(probability)(torch.ones(9)), torch.full((9,), expected))


def test_evaluation_and_torch_func_are_torchs():
    inputs = torch.randn(4, 3)
    assert torch.equal(Dropout(0.5).eval()(inputs), inputs)
    module = Dropout(0.5)
    by_row = torch.func.vmap(lambda row: module(row).sum(), randomness="different")(inputs)
    assert by_row.shape == (4,)
    gradient = torch.func.grad(lambda rows: module(rows).sum())(inputs)
    assert set(gradient.flatten().tolist()) <= {0.0, 2.0}
