"""Transformers' own tests of pipelines, run on saved models of this package."""

import unittest

import pytest

import shared_bert

from ..conftest import tiny_model
from .upstream import upstream, upstream_folder

if not (upstream_folder() / "pipelines").exists():
    pytest.skip(
        "the tests of pipelines are in transformers' repository only, which could not be reached",
        allow_module_level=True,
    )
upstream("pipelines.test_pipelines_common")  # which the mixin imports later, from the source folder beside it
mixin = upstream("test_pipeline_mixin")

pytestmark = pytest.mark.filterwarnings("ignore:It is deprecated to return a value:DeprecationWarning")


@pytest.fixture(scope="class", autouse=True)
def saved_models(request, tmp_path_factory, tokenizers):
    """Puts models where the mixin takes them from, in the place of transformers' own on the Hub."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tokenizers[request.cls.kind]
    summary = {}
    for cls in request.cls.pipeline_model_mapping.values():
        saved = folder / cls.config_class.model_type / cls.__name__
        tiny_model(request.cls.kind, cls, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(
            saved
        )
        tokenizer.save_pretrained(saved)
        summary[cls.__name__] = {"tokenizer_classes": [type(tokenizer).__name__], "processor_classes": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixin, "TRANSFORMERS_TINY_MODEL_PATH", str(folder))
        patch.setattr(mixin, "tiny_model_summary", summary)
        # Without torchvision transformers 5.17 has a dummy here, which cannot be asked whether a config is in it.
        patch.setattr(upstream("pipelines.test_pipelines_feature_extraction"), "IMAGE_PROCESSOR_MAPPING", {})
        yield


class TestBert(mixin.PipelineTesterMixin, unittest.TestCase):
    kind = "bert"
    pipeline_model_mapping = {
        "feature-extraction": shared_bert.SharedBertModel,
        "fill-mask": shared_bert.SharedBertForMaskedLM,
        "text-classification": shared_bert.SharedBertForSequenceClassification,
        "token-classification": shared_bert.SharedBertForTokenClassification,
        "zero-shot": shared_bert.SharedBertForSequenceClassification,
    }


class TestGpt(mixin.PipelineTesterMixin, unittest.TestCase):
    kind = "gpt"
    pipeline_model_mapping = {
        "feature-extraction": shared_bert.SharedGptModel,
        "text-classification": shared_bert.SharedGptForSequenceClassification,
        "text-generation": shared_bert.SharedGptForCausalLM,
        "token-classification": shared_bert.SharedGptForTokenClassification,
        "zero-shot": shared_bert.SharedGptForSequenceClassification,
    }
