"""`attn_implementation`, chosen when a model is loaded or later, and a function of one's own."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .conftest import random_model


def text_logits(model, batch):
    """The logits where there is text."""
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"] == 1]


@pytest.fixture(params=["sdpa", "flex_attention"])
def implementation(request):
    # transformers compiles flex attention; its eager form says the same in a hundredth of the time.
    with torch.compiler.set_stance("force_eager" if request.param == "flex_attention" else "default"):
        yield request.param


def test_every_implementation_gives_the_eager_logits(kind, attention, implementation, padded_batch, tmp_path):
    model = random_model(kind, **attention)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    expected = text_logits(model, padded_batch)
    model.set_attn_implementation(implementation)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation=implementation)
    for changed in (model, loaded):
        assert changed.config._attn_implementation == implementation
        torch.testing.assert_close(text_logits(changed, padded_batch), expected, rtol=1e-4, atol=1e-5)


def test_a_function_of_ones_own(kind, attention, padded_batch):
    calls = []

    def counted(module, query, key, value, attention_mask, **kwargs):
        calls.append(module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", sdpa_mask)
    model = random_model(kind, **attention)
    expected = text_logits(model, padded_batch)
    model.set_attn_implementation("counted")
    torch.testing.assert_close(text_logits(model, padded_batch), expected)
    assert calls == [0, 1]


def test_attention_that_returns_rows_of_tokens(kind, attention, padded_batch):
    """[tokens, hidden], as vLLM's backend for transformers does."""

    def rows(module, query, key, value, attention_mask, **kwargs):
        context, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return context.reshape(-1, query.shape[1] * query.shape[3]), weights

    AttentionInterface.register("rows", rows)
    AttentionMaskInterface.register("rows", sdpa_mask)
    model = random_model(kind, **attention)
    expected = text_logits(model, padded_batch)
    model.set_attn_implementation("rows")
    torch.testing.assert_close(text_logits(model, padded_batch), expected)


def test_an_unknown_implementation_is_refused(kind):
    with pytest.raises(ValueError, match="no_such_attention"):
        random_model(kind).set_attn_implementation("no_such_attention")
