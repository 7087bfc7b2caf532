"""Absurd and contradictory configs: a ValueError that names a field, or a model that runs forward and backward."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, PreTrainedConfig
from transformers.activations import ACT2FN

from shared_bert import SCHEMES, SharedBertConfig, SharedGptConfig
from shared_bert.modeling import SharedAttentionConfig
from shared_bert.modeling.configuration_shared_attention import DEPTH_SHARING

from ..conftest import CONFIGS, LANGUAGE_MODELS, TINY, tiny_config

# transformers checks its own fields, or does not, as in its other configs.
OWN = [
    field.name
    for field in dataclasses.fields(SharedAttentionConfig)
    if field.name not in PreTrainedConfig.__dataclass_fields__
    and field.name not in ("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range")
]

absurd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 4, 8, 10_001]),
    st.sampled_from([0.0, -0.5, 0.5, 1.0, 1.5, 1e-300, 1e30, float("nan"), float("inf"), float("-inf")]),
    st.sampled_from(
        ["", "0", "none", "yes", "shared", "gelu", "sharde", "\ud800", "qkvo", "float32", "float99", "a" * 300]
    ),
    st.sampled_from(
        [[], [1], [[1, 2]], [[0, 1], [2, 3]], [[1, 1, 1], [1, 1, 1]], {}, {"a": 1}, {"0": "yes"}, ["x"], (1,), b"x"]
    ),
)
# What means something, to be contradicted by what else is drawn.
sensible = st.fixed_dictionaries(
    {},
    optional={
        "attention_scheme": st.sampled_from(list(SCHEMES)),
        "attention_scale": st.sampled_from([None, 0.5, 2]),
        "num_key_value_heads": st.sampled_from([None, 1, 2, 4]),
        "depth_sharing": st.sampled_from(list(DEPTH_SHARING)),
        "depth_shared_matrices": st.sampled_from(["qkv", "qkvo"]),
        "num_atoms": st.sampled_from([None, 1, 2]),
        "num_groups": st.sampled_from([None, 1, 2]),
        "rank": st.sampled_from([None, 1, 4]),
        "layer_ranks": st.sampled_from([None, [[0, 1, 2], [3, 0, 4]], [[1], [0]], [[0, 0], [0, 0]]]),
        "coefficient_source": st.sampled_from(["direct", "network"]),
        "coefficient_init": st.sampled_from(["depth", "normal"]),
        "hidden_act": st.sampled_from(sorted(ACT2FN)),
        "pad_token_id": st.sampled_from([None, 0, 98]),
        "num_hidden_layers": st.integers(1, 3),
        "hidden_dropout_prob": st.sampled_from([0, 0.1]),
        "tie_word_embeddings": st.booleans(),
    },
)


def try_config(kind, fields, folder):
    """Gives the error of a config, or None if it can be saved and its model runs; anything else is a failure."""
    try:
        config = CONFIGS[kind](**{**TINY, "pad_token_id": 0, **fields})
        config.save_pretrained(folder)
    except ValueError as error:
        return error
    sizes = [config.hidden_size, config.intermediate_size, config.vocab_size, config.max_position_embeddings]
    sizes.append(getattr(config, "type_vocab_size", 1))
    if max(sizes) > 1000 or config.num_hidden_layers > 10:
        with torch.device("meta"):  # valid, but not to be computed here
            LANGUAGE_MODELS[kind](config) if config.num_hidden_layers <= 10 else None
        return None
    model = LANGUAGE_MODELS[kind](config)
    length = min(6, config.max_position_embeddings)
    input_ids = torch.arange(2 * length).view(2, length) % config.vocab_size
    labels = input_ids.clone()
    model(input_ids=input_ids, labels=labels, return_dict=True).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    return None


def test_any_config_runs_or_is_refused_by_name(tmp_path):
    seen = {"refused": 0, "run": 0}

    @settings(max_examples=800, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(kind=st.sampled_from(list(CONFIGS)), data=st.data())
    def check(kind, data):
        fields = data.draw(sensible)
        names = data.draw(st.lists(st.sampled_from(OWN), max_size=2))
        fields |= {name: data.draw(absurd, name) for name in names}
        error = try_config(kind, fields, tmp_path)
        seen["refused" if error else "run"] += 1
        if error is not None:
            named = set(re.findall(r"[a-z_0-9]+", str(error)))
            assert named & {*OWN}, f"{fields} -> {error}"

    check()
    assert min(seen.values()) > 100, "not worth the name"


def test_a_value_that_is_set_later_is_checked_too(kind, tmp_path):
    config = tiny_config(kind)
    with pytest.raises(ValueError, match="'hidden_size' expected int, got str"):
        config.hidden_size = "wide"
    config.num_atoms = 2
    with pytest.raises(ValueError, match="num_atoms=2 does not go with depth_sharing='none'"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("auto_class", [None, AutoModel])
def test_fields_beside_a_folder_are_checked_with_it(kind, auto_class, tmp_path):
    load = (auto_class or CONFIGS[kind]).from_pretrained
    model = LANGUAGE_MODELS[kind](tiny_config(kind))
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, num_attention_heads=2)
    config = getattr(loaded, "config", loaded)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 2)
    for fields, message in (({"num_attention_heads": 5}, "num_attention_heads=5"), ({"num_atoms": 1}, "num_atoms=1")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **fields)
    grouped = CONFIGS[kind](**TINY, attention_scheme="standard", num_key_value_heads=2, pad_token_id=0)
    grouped.save_pretrained(tmp_path)
    assert CONFIGS[kind].from_pretrained(tmp_path).num_key_value_heads == 2
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 2


def test_the_defaults_are_valid():
    for cls in (SharedBertConfig, SharedGptConfig):
        cls().validate()
