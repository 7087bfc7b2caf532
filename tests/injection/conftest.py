import pytest
import torch

import shared_bert

from .architectures import ARCHITECTURES

# Every kind of map and role: shared matrices, factors, ingredients, and the input itself.
SHARED = {
    "masa": {"depth_sharing": "masa", "num_atoms": 2, "rank": 2, "depth_shared_matrices": "qkvo"},
    "low_rank": {"depth_sharing": "low_rank", "rank": 4},
    "pairwise": {"attention_scheme": "pairwise", "initialize": True},
    "query_free": {"attention_scheme": "query_free", "initialize": True},
    "shared, sequential": {
        "attention_scheme": "shared",
        "depth_sharing": "sequential",
        "num_groups": 2,
        "initialize": True,
        "diagonal_init_std": 0.3,
    },
}


@pytest.fixture(scope="session")
def llama():
    """A tiny Llama whose keys are not grouped, so that it takes every scheme."""
    return ARCHITECTURES["llama"].model(num_key_value_heads=4)


@pytest.fixture(scope="session")
def inputs():
    return ARCHITECTURES["llama"].inputs()


@pytest.fixture(params=SHARED)
def shared(request, llama):
    """A tiny Llama that shares, in every way."""
    torch.manual_seed(0)
    return shared_bert.share(llama, **SHARED[request.param])[0]
