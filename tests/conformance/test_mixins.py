"""Transformers' own tests of models, generation and configs, run on the classes of this package.

Most tests that do not apply say so by themselves: they are about rotary positions, experts, images and the like, or
about machines with an accelerator. `SKIPPED` has the others, and one that takes long.
"""

import unittest

import pytest
import torch

import shared_bert

from ..conftest import ATTENTION, LANGUAGE_MODELS, MECHANISMS, TINY, TOKENS, tiny_config
from .upstream import upstream, upstream_folder

pytest.importorskip("parameterized", reason="needs the package parameterized")
ModelTesterMixin = upstream("test_modeling_common").ModelTesterMixin
GenerationTesterMixin = upstream("generation.test_utils").GenerationTesterMixin
ConfigTester = upstream("test_configuration_common").ConfigTester

# Of a few of transformers' tests, which its own decorators make return something.
pytestmark = pytest.mark.filterwarnings("ignore:It is deprecated to return a value:DeprecationWarning")

BASES = {"bert": shared_bert.SharedBertModel, "gpt": shared_bert.SharedGptModel}
# Every class is tested with its default scheme; base and language model with one of each mechanism.
DEFAULT = {"bert": "shared", "gpt": "query_free"}
HEADS = {
    "bert": [
        shared_bert.SharedBertForSequenceClassification,
        shared_bert.SharedBertForTokenClassification,
        shared_bert.SharedBertForQuestionAnswering,
        shared_bert.SharedBertForMultipleChoice,
    ],
    "gpt": [shared_bert.SharedGptForSequenceClassification, shared_bert.SharedGptForTokenClassification],
}
SIZES = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
# Tests that suppose what these models do not have, or cost more than they tell of this package.
SKIPPED = {
    "test_tied_head_has_a_tp_plan_entry": "tensor parallelism leaves the embeddings whole, and the head tied to them",
    "test_bc_torch_dtype": "an older name of an argument of from_pretrained, in a minute over all classes",
}


class ModelTester:
    """The tiny config and inputs that the mixins ask for, under the names that they ask for."""

    batch_size = 3
    seq_length = 7
    num_choices = 2
    is_training = True

    def __init__(self, kind: str, fields: dict):
        self.kind = kind
        self.fields = fields
        self.base_model_class = BASES[kind]
        vars(self).update(SIZES, vocab_size=TINY["vocab_size"])

    def get_config(self):
        return tiny_config(self.kind, **self.fields)

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        # The special tokens, which the first ones are, would end generation or count as padding.
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(max(TOKENS.values()) + 1, self.vocab_size, shape, generator=generator)
        attention_mask = torch.ones(shape, dtype=torch.long)
        attention_mask[0, :2] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


def model_tests(kind: str, name: str) -> type:
    mixins = (GenerationTesterMixin, ModelTesterMixin) if kind == "gpt" else (ModelTesterMixin,)

    def set_up(self):
        self.model_tester = ModelTester(kind, ATTENTION[name])

    heads = HEADS[kind] if name == DEFAULT[kind] else []
    skipped = {
        test: unittest.skip(reason)(getattr(ModelTesterMixin, test))
        for test, reason in SKIPPED.items()
        if hasattr(ModelTesterMixin, test)  # in this version of transformers
    }
    contents = skipped | {
        "setUp": set_up,
        "all_model_classes": (BASES[kind], LANGUAGE_MODELS[kind], *heads),
        "test_can_init_all_missing_weights_before_2023": True,
        "pytestmark": [] if name == DEFAULT[kind] else [pytest.mark.slow],
    }
    return type(f"Test_{kind}_{name}", (*mixins, unittest.TestCase), contents)


globals().update({f"Test_{kind}_{name}": model_tests(kind, name) for kind in BASES for name in MECHANISMS})


@pytest.mark.skipif((upstream_folder() / "generation").exists(), reason="they are there, and run by the classes above")
def test_generation():
    pytest.skip("the tests of generation are in transformers' repository only, which could not be reached")


def test_the_mixins_make_labels(kind):
    """They know by name which classes take which; of a name unknown to them they would test no loss."""
    tests = model_tests(kind, DEFAULT[kind])()
    tests.setUp()
    for head in (LANGUAGE_MODELS[kind], *HEADS[kind]):
        made = tests._prepare_for_class({}, head, return_labels=True)
        assert made.keys() & {"labels", "start_positions"}, head


def test_config(kind, attention):
    ConfigTester(unittest.TestCase(), type(tiny_config(kind)), **SIZES, **attention).run_common_tests()
