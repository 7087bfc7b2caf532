"""Attention as the papers write it: every role computed by itself, head by head, nothing folded."""

import math

import torch


def literal_attention(module, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """What `module`, a `SelfAttention`, must compute for `x` [batch, seq, hidden].

    `allowed` [batch, seq, seq] says which token (row) may attend to which (column).
    """
    config, scheme = module.config, module.config.attention_scheme
    weights = module.projection.weight.split(module.widths)
    biases = [0.0] * len(weights) if module.projection.bias is None else module.projection.bias.split(module.widths)
    made = [x @ w.T + b for w, b in zip(weights, biases, strict=True)]

    if scheme in ("standard", "symmetric", "pairwise"):
        q, *rest = made
        k, v = rest if scheme == "standard" else (q, rest[0])
    elif scheme == "shared":
        (s,) = made
        q, k, v = s * module.query_diagonal, s * module.key_diagonal, s * module.value_diagonal
    elif scheme == "unified":
        q = k = v = made[0]
    elif scheme == "query_free":
        q, (k, v) = x, made
    elif scheme == "key_free":
        (q, v), k = made, x
    elif scheme == "value_free":
        (q, k), v = made, x
    elif scheme == "shared_kv":
        q, k = made
        v = k

    multiple = config.attention_scale or (0.5 if scheme == "query_free" else 1.0)
    size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    contexts = []
    for head in range(config.num_attention_heads):
        shared = head // group
        q_h = q[..., head * size : (head + 1) * size]
        k_h, v_h = (t[..., shared * size : (shared + 1) * size] for t in (k, v))
        if scheme == "pairwise":
            k_h = q_h @ module.pairwise[head]
        logits = multiple / math.sqrt(size) * (q_h @ k_h.transpose(1, 2))
        contexts.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v_h)
    return module.output(torch.cat(contexts, dim=-1))
