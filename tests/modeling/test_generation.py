"""Generation with a cache is generation without one, and one stream takes half the bytes."""

import pytest
import torch
from transformers import DynamicCache

from shared_bert import SCHEMES
from tests.conftest import tiny_model

WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}


def generate(model, input_ids, **kwargs):
    torch.manual_seed(0)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0} | kwargs
    return model.generate(input_ids, return_dict_in_generate=True, output_logits=True, **options)


@pytest.fixture
def model(scheme):
    return tiny_model("gpt", attention_scheme=scheme, initializer_range=0.3)


@pytest.mark.parametrize("way", WAYS)
def test_cached_is_uncached(model, way, input_ids):
    cached = generate(model, input_ids, **WAYS[way])
    plain = generate(model, input_ids, use_cache=False, **WAYS[way])
    assert torch.equal(cached.sequences, plain.sequences)
    for got, expected in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_static_cache_is_dynamic_cache(model, input_ids):
    static = generate(model, input_ids, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, generate(model, input_ids, do_sample=False).sequences)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_left_padding_changes_nothing(model, way, input_ids):
    alone = generate(model, input_ids[:1, 4:], **WAYS[way]).sequences[:, 8:]
    padded = input_ids[:1].clone()
    padded[:, :4] = 0
    mask = (padded != 0).long()
    assert torch.equal(generate(model, padded, attention_mask=mask, **WAYS[way]).sequences[:, 12:], alone)


def test_a_forward_in_two_steps_is_one(model, input_ids):
    with torch.no_grad():
        whole = model(input_ids).logits
        first = model(input_ids[:, :7], use_cache=True)
        rest = model(input_ids[:, 7:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


def test_one_stream_is_half_the_bytes(model, scheme, input_ids):
    def cached_bytes(cache):
        storages = {t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)}
        return sum(storage.nbytes() for storage in storages)

    cache = generate(model, input_ids, do_sample=False).past_key_values
    tokens = 12 + 9 - 1
    stream = 2 * 2 * tokens * 32 * 4  # layers · batch · tokens · hidden · bytes
    assert cached_bytes(cache) == stream * (1 if SCHEMES[scheme].key_is_value else 2)


def test_grouped_queries_cache_fewer_heads(input_ids):
    model = tiny_model("gpt", attention_scheme="shared_kv", num_key_value_heads=2, initializer_range=0.3)
    cached = generate(model, input_ids, do_sample=False)
    assert torch.equal(cached.sequences, generate(model, input_ids, do_sample=False, use_cache=False).sequences)
    assert cached.past_key_values.layers[0].keys.shape[1] == 2


@pytest.mark.parametrize("scheme", ["shared"])
def test_what_is_done_to_a_cache_is_done_to_its_stream_once(model, input_ids):
    def filled():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids, past_key_values=cache, use_cache=True)
        return cache

    before = filled().layers[0].keys
    for change, expected in (
        (lambda cache: cache.crop(-5), before[:, :, :-5]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), before.flip(0)),
        (lambda cache: cache.batch_repeat_interleave(3), before.repeat_interleave(3, dim=0)),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), before[1:]),
    ):
        cache = filled()
        change(cache)
        layer = cache.layers[0]
        assert layer.keys is layer.values
        assert torch.equal(layer.keys, expected)
    cache = filled()
    cache.reset()
    assert cache.layers[0].values is cache.layers[0].keys


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}, {"num_beams": 3}],
)
def test_generation_ends_at_the_last_position(input_ids, options):
    """Of the 40; the last token needs none. Padding takes none either."""
    model = tiny_model("gpt", initializer_range=0.3)
    longer = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False, **options}
    within = generate(model, input_ids, **longer | {"max_new_tokens": 29, "min_new_tokens": 29}).sequences
    assert within.shape[1] == 41
    assert torch.equal(generate(model, input_ids, **longer).sequences, within)
    mask = torch.nn.functional.pad(torch.ones_like(input_ids), (10, 0))
    padded = torch.nn.functional.pad(input_ids, (10, 0))
    assert torch.equal(generate(model, padded, attention_mask=mask, **longer).sequences[:, 10:], within)
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(generate(model, None, inputs_embeds=embeds, **longer).sequences, within[:, 12:])


def test_positions_are_counted_not_tokens(input_ids):
    """Where a mask is inferred from the padding, positions are given, or a cache is continued."""
    model, longer = tiny_model("gpt", initializer_range=0.3), {"max_new_tokens": 60, "do_sample": False}
    input_ids = input_ids.clamp(min=1)
    within = generate(model, input_ids, **longer).sequences
    assert within.shape[1] == 41
    padded = torch.nn.functional.pad(input_ids, (30, 0))
    assert torch.equal(generate(model, padded, **longer).sequences[:, 30:], within)
    offset = 3 + torch.arange(input_ids.shape[1]).expand_as(input_ids)
    assert generate(model, input_ids, position_ids=offset, **longer).sequences.shape[1] == 41 - 3
    cache = model(input_ids[:, :-1], use_cache=True).past_key_values
    mask = torch.ones_like(input_ids)
    continued = generate(model, input_ids[:, -1:], attention_mask=mask, past_key_values=cache, **longer).sequences
    assert torch.equal(continued, within[:, input_ids.shape[1] - 1 :])
    forced = generate(model, input_ids, forced_eos_token_id=3, **longer).sequences
    assert (forced[:, -1] == 3).all()
    assistant = tiny_model("gpt", initializer_range=0.3, num_hidden_layers=1)
    assisted = generate(model, input_ids[:1], assistant_model=assistant, **longer).sequences
    assert torch.equal(assisted, within[:1])


def test_a_prompt_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings=40"):
        generate(tiny_model("gpt"), torch.ones(1, 42, dtype=torch.long))
