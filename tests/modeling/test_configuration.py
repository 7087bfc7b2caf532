"""Configs: defaults of the papers, and a clear error for what has no meaning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_bert import SCHEMES, SharedBertConfig, SharedBertModel, SharedGptConfig
from tests.conftest import CONFIGS, TINY


def test_defaults_are_the_papers():
    bert, gpt = SharedBertConfig(), SharedGptConfig()
    assert (bert.attention_scheme, bert.attention_bias, bert.scheme.scale) == ("shared", True, 1.0)
    assert (gpt.attention_scheme, gpt.scheme.scale) == ("query_free", 0.5)
    assert not any([gpt.attention_bias, gpt.mlp_bias, gpt.norm_bias])
    assert (gpt.vocab_size, gpt.max_position_embeddings) == (50304, 1024)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_scheme": "sharde"}, "attention_scheme='sharde'.*shared"),
        ({"hidden_size": 30}, "num_attention_heads=4 must divide hidden_size=30"),
        ({"num_key_value_heads": 3, "attention_scheme": "standard"}, "num_key_value_heads=3 must divide"),
        ({"num_key_value_heads": 2, "attention_scheme": "shared"}, "num_key_value_heads=2 groups queries.*standard"),
        ({"num_key_value_heads": 2, "attention_scheme": "symmetric"}, "num_key_value_heads=2"),
        ({"num_key_value_heads": 2, "attention_scheme": "value_free"}, "num_key_value_heads=2"),
        ({"attention_scale": 0.0}, "attention_scale"),
        ({"attention_scale": float("nan")}, "attention_scale"),
        ({"pairwise_init": "eye"}, "'pairwise_init' expected one of .*, got eye"),
        ({"depth_sharing": "masaa"}, "'depth_sharing' expected one of .*'masa'.*, got masaa"),
        ({"diagonal_init_std": -1.0}, "diagonal_init_std"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads.* must be greater or equal to 1, got 0"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": True}, "'hidden_size' expected int, got bool"),
    ],
)
def test_what_has_no_meaning_is_refused(kind, fields, named):
    with pytest.raises(ValueError, match=named):
        CONFIGS[kind](**(TINY | fields))


def test_a_scheme_that_was_changed_later_is_refused():
    config = SharedBertConfig(**TINY)
    config.attention_scheme = "nonsense"
    with pytest.raises(ValueError, match="attention_scheme='nonsense'"):
        SharedBertModel(config)


@settings(max_examples=50, deadline=None)
@given(scheme=st.sampled_from(list(SCHEMES)), groups=st.sampled_from([1, 2, 4]), scale=st.floats(0.1, 2))
def test_configs_survive_saving(tmp_path_factory, scheme, groups, scale):
    if groups > 1 and not SCHEMES[scheme].can_group:
        groups = 1
    for cls in CONFIGS.values():
        config = cls(**TINY, attention_scheme=scheme, num_key_value_heads=4 // groups, attention_scale=scale)
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder)
        assert cls.from_pretrained(folder).to_dict() == config.to_dict()
