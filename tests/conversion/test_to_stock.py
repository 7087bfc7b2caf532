"""`to_stock` gives a plain BERT or GPT-2 with the same outputs, and `read_stock` takes it back."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2LMHeadModel,
)

import shared_bert
from shared_bert.conversion.families import STOCK_CLASSES
from shared_bert.conversion.stock import read_stock

from ..conftest import tiny_config

DEPTH_SHARINGS = [
    {"depth_sharing": "masa", "num_atoms": 2},
    {"depth_sharing": "masa", "num_atoms": 2, "coefficient_source": "network", "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "masa", "num_atoms": 2, "rank": 3, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "sequential", "num_groups": 2},
    {"depth_sharing": "sequential", "num_groups": 2, "rank": 3, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "repeat_all_over", "num_groups": 2, "depth_shared_matrices": "qkvo"},
    {"depth_sharing": "low_rank", "rank": 5},
    {"depth_sharing": "low_rank", "rank": 5, "depth_shared_matrices": "qkvo"},
]


def random_model(cls, **fields):
    """A model in which every parameter matters: none is zero, one or an identity."""
    torch.manual_seed(0)
    kind = "bert" if cls.config_class is shared_bert.SharedBertConfig else "gpt"
    model = cls(tiny_config(kind, **{"num_hidden_layers": 3, "num_labels": 3, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def outputs(model, input_ids, **inputs) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = 0
    # GPT-2's classifier finds the end of a text by its padding tokens, not by the mask.
    input_ids = input_ids.masked_fill(mask == 0, model.config.pad_token_id or 0)
    if "MultipleChoice" in type(model).__name__:
        input_ids, mask = (t.view(1, 2, -1) for t in (input_ids, mask))
    with torch.no_grad():
        result = model(input_ids, attention_mask=mask, **inputs)
    return {name: tensor for name, tensor in result.items() if isinstance(tensor, torch.Tensor)}


def assert_same(model, other, input_ids):
    expected, found = outputs(model, input_ids), outputs(other, input_ids)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        assert (tensor - found[name]).norm() <= 1e-5 * tensor.norm(), name


def assert_converts(model, input_ids):
    stock = shared_bert.to_stock(model)
    assert type(stock) is STOCK_CLASSES[type(model)]
    assert_same(model, stock, input_ids)
    assert_same(stock, read_stock(stock), input_ids)


@pytest.mark.parametrize("cls", STOCK_CLASSES)
def test_every_head(cls, input_ids):
    assert_converts(random_model(cls, attention_scheme="shared", attention_bias=True), input_ids)


def test_every_scheme(kind, scheme, input_ids):
    cls = {"bert": shared_bert.SharedBertModel, "gpt": shared_bert.SharedGptForCausalLM}[kind]
    assert_converts(random_model(cls, attention_scheme=scheme, attention_bias=True), input_ids)


@pytest.mark.parametrize("fields", DEPTH_SHARINGS)
@pytest.mark.parametrize("attention_scheme", ["standard", "shared", "query_free"])
def test_every_depth_sharing(kind, fields, attention_scheme, input_ids):
    cls = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptModel}[kind]
    assert_converts(random_model(cls, attention_scheme=attention_scheme, **fields), input_ids)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1, "attention_scheme": "shared_kv"},
        {"num_key_value_heads": 2, "depth_sharing": "masa", "num_atoms": 2},
        {"attention_bias": False},
        {"attention_scale": 0.3},
        {"attention_scale": 2, "attention_scheme": "query_free"},
    ],
)
def test_every_other_field_of_attention(kind, fields, input_ids):
    cls = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptForCausalLM}[kind]
    assert_converts(random_model(cls, **{"attention_scheme": "standard", **fields}), input_ids)


def test_gpt_with_all_biases(input_ids):
    biases = {"attention_bias": True, "mlp_bias": True, "norm_bias": True}
    assert_converts(random_model(shared_bert.SharedGptForCausalLM, **biases), input_ids)


@pytest.mark.parametrize("attention_scheme", ["query_free", "unified"])
def test_generation(attention_scheme, input_ids):
    model = random_model(shared_bert.SharedGptForCausalLM, attention_scheme=attention_scheme)
    model.generation_config.max_new_tokens = 9
    written = shared_bert.to_stock(model).generate(input_ids, do_sample=False)
    assert written.shape[1] > input_ids.shape[1]
    assert torch.equal(written, model.generate(input_ids, do_sample=False))


def test_the_copy_is_of_the_same_kind(kind, input_ids):
    cls = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptForCausalLM}[kind]
    model = random_model(cls, pad_token_id=7).double().train()
    model.set_attn_implementation("eager")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = shared_bert.to_stock(model)
    assert stock.dtype == torch.float64
    assert stock.training
    assert stock.config._attn_implementation == "eager"
    assert stock.config.pad_token_id == 7
    for name, tensor in outputs(model, input_ids).items():
        torch.testing.assert_close(outputs(stock, input_ids)[name], tensor, rtol=1e-12, atol=1e-12)
    stock_storage = {p.data_ptr() for p in stock.parameters()}
    assert not stock_storage & {p.data_ptr() for p in model.parameters()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_tied_or_untied(kind, tied, input_ids):
    cls = {"bert": shared_bert.SharedBertForMaskedLM, "gpt": shared_bert.SharedGptForCausalLM}[kind]
    model = random_model(cls, tie_word_embeddings=tied)
    for converted in (shared_bert.to_stock(model), read_stock(shared_bert.to_stock(model))):
        head, embeddings = converted.get_output_embeddings().weight, converted.get_input_embeddings().weight
        assert (head is embeddings) == tied
        assert converted.config.tie_word_embeddings == tied
        assert_same(model, converted, input_ids)


def test_a_model_without_pooler(input_ids):
    torch.manual_seed(0)
    model = shared_bert.SharedBertModel(tiny_config("bert"), add_pooling_layer=False).eval()
    assert shared_bert.to_stock(model).pooler is None
    assert_converts(model, input_ids)


@pytest.mark.parametrize("make", [lambda: GPT2LMHeadModel(STOCK_GPT2), lambda: BertForMaskedLM(STOCK_BERT)])
def test_stock_models_are_read_exactly(make, input_ids):
    torch.manual_seed(0)
    stock = make().eval()
    shared = read_stock(stock)
    assert shared.config.attention_scheme == "standard"
    assert_same(stock, shared, input_ids)


STOCK_BERT = BertConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=40,
)  # fmt: skip
STOCK_GPT2 = GPT2Config(
    vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, scale_attn_weights=False, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def test_what_is_no_model_of_this_package_is_refused():
    class Headed(shared_bert.SharedBertForMaskedLM):
        pass

    class Wrapper(nn.Module):  # as PEFT's
        def __init__(self, model):
            super().__init__()
            self.model = model

    with pytest.raises(ValueError, match=r"BertModel has no stock counterpart.*SharedBertModel"):
        shared_bert.to_stock(BertModel(STOCK_BERT))
    with pytest.raises(ValueError, match="Headed has no stock counterpart"):
        shared_bert.to_stock(Headed(tiny_config("bert")))
    with pytest.raises(ValueError, match=r"Wrapper has no stock counterpart.*merge adapters"):
        shared_bert.to_stock(Wrapper(random_model(shared_bert.SharedBertModel)))


def test_what_has_no_counterpart_here_is_refused():
    with pytest.raises(ValueError, match=r"BertForPreTraining cannot be converted.*BertForMaskedLM"):
        read_stock(BertForPreTraining(STOCK_BERT))
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel cannot be converted"):
        read_stock(GPT2DoubleHeadsModel(STOCK_GPT2))
    decoder = BertConfig(**{**STOCK_BERT.to_dict(), "is_decoder": True})
    with pytest.raises(ValueError, match="BertModel with is_decoder=True"):
        read_stock(BertModel(decoder))
    with pytest.raises(ValueError, match="GPT2LMHeadModel with scale_attn_by_inverse_layer_idx=True"):
        read_stock(GPT2LMHeadModel(GPT2Config(**{**STOCK_GPT2.to_dict(), "scale_attn_by_inverse_layer_idx": True})))
