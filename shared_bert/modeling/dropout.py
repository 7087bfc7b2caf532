"""Dropout on a CPU, with noise that is drawn fast and made again in the backward pass.

torch draws one Bernoulli variable after the other on a CPU, 12 ns each (a seventh of a training step of BERT-base),
and keeps them in float32. Here 16 random bits decide about an element, which takes a tenth of the time, and only the
seed is kept. On other devices, under `torch.compile` and in `torch.func` dropout is torch's.
"""

import math

import numpy as np
import torch
from torch import nn

LEVELS = 2**16


class Noise:
    """The noise of dropout as a sequence of draws, which is the same for the same seed.

    Args:
        probability: of a zero, in [0, 1); rounded to a multiple of 2⁻¹⁶.
        seed: a non-negative integer.
    """

    def __init__(self, probability: float, seed: int):
        zeros = min(round(probability * LEVELS), LEVELS - 1)
        self.threshold = zeros - LEVELS // 2
        self.scale = LEVELS / (LEVELS - zeros)
        self.bits = np.random.SFC64(seed)

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return ones and zeros; what is multiplied by them must be multiplied by `scale` to keep its mean."""
        size = math.prod(shape)
        words = self.bits.random_raw(-(-size // 4)).view(np.int16)[:size]
        return torch.ge(torch.from_numpy(words).view(shape), self.threshold, out=torch.empty(shape, dtype=dtype))


def new_seed() -> int:
    """Return a seed from torch's generator, so that `torch.manual_seed` and checkpointing decide about the noise."""
    return int(torch.randint(2**63 - 1, ()))


def runs_plainly_on_cpu(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` is an ordinary one on a CPU, and nothing compiles, traces or transforms what is done."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )


class _SeededDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, probability, seed):
        ctx.settings = probability, seed
        noise = Noise(probability, seed)
        return noise.draw(inputs.shape, inputs.dtype).mul_(inputs).mul_(noise.scale)

    @staticmethod
    def backward(ctx, gradient):
        noise = Noise(*ctx.settings)
        return gradient * noise.draw(gradient.shape, gradient.dtype).mul_(noise.scale), None, None


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster and without stored noise on a CPU."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training and 0 < self.p < 1 and runs_plainly_on_cpu(inputs):
            return _SeededDropout.apply(inputs, self.p, new_seed())
        return super().forward(inputs)
