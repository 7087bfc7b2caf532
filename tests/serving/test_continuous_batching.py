"""Continuous batching of transformers writes what `generate` writes."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from shared_bert import SharedGptForCausalLM

from ..conftest import ATTENTION
from ..ecosystem.conftest import random_model

ROWS = [[5, 6, 7, 8, 9, 11], [9, 3, 2], [4] * 9]
# No token ends the text.
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}

# The older name, of transformers 5.17, is deprecated in 5.23.
PAGE_SIZE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"


# Fewer tokens in a batch than the prompts have, so that they are read in parts.
PAGED = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=8, **{PAGE_SIZE: 4})


# One of each kind of cache, of projection and of stored matrix.
SOME = ("standard", "pairwise", "shared", "query_free", "grouped", "masa_network", "low_rank")


@pytest.mark.parametrize(("name", "implementation"), [*((name, "sdpa") for name in SOME), ("pairwise", "eager")])
def test_it_writes_what_generate_writes(name, implementation):
    model = random_model("gpt", initializer_range=0.3, **ATTENTION[name])
    expected = [model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in ROWS]
    model.set_attn_implementation(implementation)
    outputs = model.generate_batch(
        ROWS, generation_config=GenerationConfig(**GREEDY), continuous_batching_config=PAGED
    )
    assert [output.generated_tokens for _, output in sorted(outputs.items())] == expected


def test_generate_keeps_one_stream_afterwards(tmp_path):
    model = random_model("gpt", attention_scheme="shared")
    model.generate_batch(ROWS, GenerationConfig(**GREEDY), continuous_batching_config=PAGED)
    cache = model(torch.tensor(ROWS[:1]), use_cache=True).past_key_values
    assert cache.layers[0].keys is cache.layers[0].values
    with model.continuous_batching_context_manager(GenerationConfig(**GREEDY), continuous_batching_config=PAGED):
        assert model.config.layer_types == ["full_attention"] * 2
    assert model.config.layer_types == ["shared_kv_attention"] * 2
    model.init_continuous_batching(GenerationConfig(**GREEDY))
    assert model.config.layer_types == ["full_attention"] * 2
    model.generate_batch(ROWS, GenerationConfig(**GREEDY), continuous_batching_config=PAGED)
    assert model.config.layer_types == ["full_attention"] * 2  # the manager above can still be started
    model.save_pretrained(tmp_path)
    again = SharedGptForCausalLM.from_pretrained(tmp_path)
    assert again.config.layer_types == ["shared_kv_attention"] * 2


def test_texts_end_at_the_last_position():
    """Of the 40; the last token needs none."""
    model = random_model("gpt", initializer_range=0.3)
    longer = {**GREEDY, "max_new_tokens": 60}
    expected = [model.generate(torch.tensor([row]), **longer)[0, len(row) :].tolist() for row in ROWS]
    assert [len(written) for written in expected] == [41 - len(row) for row in ROWS]
    paged = {
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=8, **{PAGE_SIZE: 4})
    }
    outputs = model.generate_batch(ROWS, GenerationConfig(**longer), **paged)
    assert [output.generated_tokens for _, output in sorted(outputs.items())] == expected
    prompt = torch.tensor(ROWS[:1])
    written = model.generate(prompt, GenerationConfig(**longer), cache_implementation="paged", **paged)
    assert written.flatten().tolist() == ROWS[0] + expected[0]
    with pytest.raises(ValueError, match=r"41 tokens.*max_position_embeddings=40"):
        model.generate_batch([ROWS[0], [4] * 41], GenerationConfig(**GREEDY), **paged)
