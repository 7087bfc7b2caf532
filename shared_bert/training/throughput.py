"""The arithmetic of training, and the peak of a device."""

import time

import torch
from torch import nn
from transformers import PreTrainedModel

from ..injection.linear import SharedMap
from ..modeling.depth_sharing import DepthSharing, SharedMatrix
from ..modeling.projections import SharedLinear

# Dense bfloat16 FLOP/s from the data sheets; the first name that the device's name contains is used.
_DATASHEET = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def per_token_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return the modules of the base model, without the pooler: it belongs to the head, and reads one token a row."""
    modules = set(model.base_model.modules())
    pooler = getattr(model.base_model, "pooler", None)
    return modules if pooler is None else modules - set(pooler.modules())


def training_flops_per_token(model: PreTrainedModel, sequence_length: int, predicted_share: float = 1.0) -> float:
    """Return the floating-point operations of one training step, per token of input.

    A token takes B + p·H + 2·L·n·d multiply-adds forward: B the elements of the base model's matrices, H those of
    the head's and the pooler's, p the share of positions that the head predicts, and 2·n·d for the logits and the
    weighted sum of attention in each of L layers of width d over n tokens. A multiply-add is 2 operations, and
    backward takes twice forward: 6 in all. Embeddings are looked up and not counted; masked attention counts in full.
    A matrix that layers share counts in each of them; assembling it takes nothing per token.

    Args:
        sequence_length: n, tokens per row.
        predicted_share: p, predicted positions per token.
    """
    base_modules = per_token_modules(model)
    apart = DepthSharing | SharedMatrix | nn.Embedding
    not_per_token = {part for m in base_modules if isinstance(m, apart) for part in m.modules()}
    base = head = 0
    for module in model.modules():
        matrices = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 2)
        if isinstance(module, SharedLinear) or (isinstance(module, SharedMap) and module.dictionaries[0]):
            matrices += module.in_features * module.out_features
        if module not in base_modules:
            head += matrices
        elif module not in not_per_token:
            base += matrices
    config = model.config.get_text_config()
    attention = 2 * config.num_hidden_layers * sequence_length * config.hidden_size
    return 6 * (base + predicted_share * head + attention)


def peak_flops(device: torch.device) -> float:
    """Return the peak FLOP/s of a device: from its data sheet, else measured with one large product."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for known, flops in _DATASHEET.items():
        if known in name:
            return flops
    return _measured_flops(device)


def _measured_flops(device: torch.device, size: int = 1024, repeats: int = 20) -> float:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
