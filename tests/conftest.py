"""Tiny models that all tests share."""

import functools
import gc

import pytest
import torch

import shared_bert
from shared_bert.training import throughput

# Threads cost tiny models more than they give.
torch.set_num_threads(1)
# Measured once for all runs: it takes as long as a tiny run does.
throughput._measured_flops = functools.cache(throughput._measured_flops)


def pytest_collection_finish():
    """Libraries are not garbage: without this, Trainer would search them in every run."""
    gc.freeze()


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    "max_position_embeddings": 40,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {"bert": shared_bert.SharedBertConfig, "gpt": shared_bert.SharedGptConfig}
# Every scheme, and every way to store matrices over the depth.
ATTENTION = {scheme: {"attention_scheme": scheme} for scheme in shared_bert.SCHEMES} | {
    "grouped": {"attention_scheme": "shared_kv", "num_key_value_heads": 2},
    "masa": {"attention_scheme": "standard", "depth_sharing": "masa", "num_atoms": 2, "depth_shared_matrices": "qkvo"},
    "masa_network": {"depth_sharing": "masa", "num_atoms": 1, "coefficient_source": "network"},
    "sequential": {"depth_sharing": "sequential", "num_groups": 1, "rank": 2},
    "repeat_all_over": {"depth_sharing": "repeat_all_over", "num_groups": 2},
    "low_rank": {
        "attention_scheme": "standard",
        "depth_sharing": "low_rank",
        "rank": 4,
        "depth_shared_matrices": "qkvo",
    },
}
# One of each mechanism: diagonals, pairwise matrices, the input as a role, fewer heads of keys, atoms and factors of
# matrices. Other rows of the table take the same code, and are compared with literal attention in tests/modeling.
MECHANISMS = ("shared", "pairwise", "query_free", "grouped", "masa_network", "low_rank")
LANGUAGE_MODELS = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptForCausalLM}


def tiny_config(kind: str, **fields):
    # Diagonals away from one, and pairwise matrices away from identity, so that every parameter matters.
    return CONFIGS[kind](**(TINY | NO_DROPOUT | TOKENS | {"diagonal_init_std": 0.3} | fields))


def tiny_model(kind: str, cls=None, **fields):
    torch.manual_seed(0)
    return (cls or LANGUAGE_MODELS[kind])(tiny_config(kind, **fields)).eval()


TEXT = "the fox hunts . the dog barks . the owl sees . the cat naps . the hen lays . the cow stands ."


@pytest.fixture(scope="session")
def tokenizers():
    """A tokenizer of each kind that knows a few words."""
    from datasets import Dataset

    from shared_bert.data import train_tokenizer

    documents = Dataset.from_dict({"text": [TEXT] * 20})
    kinds = {"bert": "wordpiece", "gpt": "byte_bpe"}
    return {
        name: train_tokenizer(kind, documents, vocab_size=300, model_max_length=40) for name, kind in kinds.items()
    }


@pytest.fixture(params=list(shared_bert.SCHEMES))
def scheme(request) -> str:
    return request.param


@pytest.fixture(params=list(ATTENTION))
def attention(request) -> dict:
    """Config fields of a scheme or a depth sharing."""
    return ATTENTION[request.param]


@pytest.fixture(params=["bert", "gpt"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))


def learns_in_bfloat16(model, inputs: dict, compiled: bool, steps: int) -> bool:
    """Whether the loss of one batch falls by a nat, on a GPU."""
    model.cuda().train()
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    forward = torch.compile(model, fullgraph=True) if compiled else model
    losses = []
    for _ in range(steps):
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[-1] < losses[0] - 1
