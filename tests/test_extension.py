"""A new scheme is a row, a new ingredient a class, a new family a record: nothing else of the package knows them."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import shared_bert
from shared_bert.conversion import families
from shared_bert.conversion.alignment import Freedom, align_layers
from shared_bert.conversion.dense import Affine, SchemeLayer
from shared_bert.evaluation import cost_table
from shared_bert.modeling.configuration_shared_attention import checked
from shared_bert.modeling.ingredients import Ingredient

from .conftest import tiny_config, tiny_model


class Temperature(Ingredient):
    """One factor on the logits of each head."""

    words = "a temperature for each head"

    def shapes(self, heads, head_dim):
        return {"temperature": (heads,)}

    def init_weights(self, parameters, config):
        torch.nn.init.constant_(parameters["temperature"], 3.0)

    def fold_query(self, attention, query):
        return query * attention.temperature[:, None, None]

    def multiply_out(self, parameters, role, rows):
        if role != "query":
            return rows
        factor = parameters["temperature"][:, None, None]
        return (factor * rows.unflatten(0, (len(factor), -1))).flatten(0, 1)


@pytest.mark.parametrize("ingredient", [Ingredient(), Temperature()])
@pytest.mark.parametrize("depth_sharing", [{}, {"depth_sharing": "masa", "num_atoms": 1}])
def test_a_tenth_scheme(monkeypatch, kind, ingredient, depth_sharing, input_ids, tmp_path):
    monkeypatch.setitem(shared_bert.SCHEMES, "made_up", shared_bert.Scheme("q", "k", "q", ingredient))
    model = tiny_model(kind, attention_scheme="made_up", **depth_sharing)
    out = model(input_ids, labels=input_ids)
    out.loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for same in (loaded, shared_bert.to_stock(model)):
        torch.testing.assert_close(same(input_ids).logits, out.logits, rtol=1e-4, atol=1e-5)
    assert "made_up" in cost_table(model.config)
    with pytest.raises(ValueError, match="attention_scheme='made_up' cannot be fitted"):
        shared_bert.from_stock(tiny_model(kind, attention_scheme="standard"), "made_up")
    deep, _ = shared_bert.from_stock(model, "made_up", "masa", num_atoms=2)
    torch.testing.assert_close(deep(input_ids).logits, out.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scheme", [shared_bert.Scheme("q", "k", "q"), shared_bert.Scheme("q", "k", "k"), shared_bert.Scheme("q", "k", "v")]
)
def test_matrices_in_several_roles_turn_once(monkeypatch, scheme):
    """Aligned layers do what they did, whichever roles their matrices play."""
    monkeypatch.setitem(shared_bert.SCHEMES, "made_up", scheme)
    config = tiny_config("bert", attention_scheme="made_up", depth_sharing="masa", num_atoms=1)
    generator = torch.Generator().manual_seed(0)

    def matrix():
        return Affine(torch.randn(32, 32, generator=generator, dtype=torch.float64), torch.zeros(32).double())

    layers = [SchemeLayer({name: matrix() for name in (*scheme.matrices, "o")}) for _ in range(2)]

    def products(layer):
        query, key, value = (layer.matrices[role].weight.view(4, 8, 32) for role in scheme.roles)
        return query.mT @ key, value.mT @ layer.matrices["o"].weight.T.view(4, 8, 32)

    aligned = align_layers(layers, scheme, Freedom.of(scheme, 4), config.shared_widths, config, [(0, 2, 1)])
    moved = sum(
        (new.matrices["q"].weight - old.matrices["q"].weight).norm() for new, old in zip(aligned, layers, strict=True)
    )
    assert moved > 1
    for new, old in zip(aligned, layers, strict=True):
        for found, expected in zip(products(new), products(old), strict=True):
            torch.testing.assert_close(found, expected[new.head_order])


class OtherStockConfig(GPT2Config):
    model_type = "other_stock"


class OtherStockForCausalLM(GPT2LMHeadModel):
    config_class = OtherStockConfig


@checked
class OtherConfig(shared_bert.SharedGptConfig):
    model_type = "other"
    auto_classes = {"AutoModelForCausalLM": "OtherForCausalLM"}


class OtherForCausalLM(shared_bert.SharedGptForCausalLM):
    config_class = OtherConfig


def test_a_third_family(input_ids, tmp_path):
    families.register(
        dataclasses.replace(
            families.FAMILIES["shared_gpt"],
            description="decoder of another family",
            config=OtherConfig,
            stock_config=OtherStockConfig,
            classes={OtherForCausalLM: OtherStockForCausalLM},
            language_model=OtherForCausalLM,
        )
    )
    config = OtherConfig(**{**tiny_config("gpt").to_dict(), "model_type": "other", "attention_scheme": "shared"})
    model = OtherForCausalLM(config).eval()
    out = model(input_ids, labels=input_ids)
    out.loss.backward()
    model.save_pretrained(tmp_path)
    stock = shared_bert.to_stock(model)
    assert type(stock) is OtherStockForCausalLM
    converted, _ = shared_bert.from_stock(stock, "shared")
    assert type(converted) is OtherForCausalLM
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for same in (loaded, stock, converted):
        torch.testing.assert_close(same(input_ids).logits, out.logits, rtol=1e-4, atol=1e-5)
    assert cost_table(config).startswith("other, shared")
