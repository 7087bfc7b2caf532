"""The parts of the benchmark beside training steps: growth, packed documents, encoding, decoding."""

import json
import runpy
import sys
from dataclasses import replace

import pytest
from datasets import Dataset

from shared_bert.evaluation import StepSettings, efficiency, growth
from shared_bert.evaluation.efficiency import Decoding, DecodingSettings
from shared_bert.evaluation.growth import draw_growth, growth_table, measure_growth
from shared_bert.evaluation.packing_speed import compare_packing
from tests.conftest import TEXT

SHAPE = (("hidden_size", 32), ("num_hidden_layers", 2), ("num_attention_heads", 2), ("intermediate_size", 32))
FIELDS = ",".join(f"{name}={value}" for name, value in SHAPE)


@pytest.fixture
def compared():
    settings = StepSettings("mlm", 1, 16, "shared", model_fields=(*SHAPE, ("vocab_size", 64)))
    return {"stock": replace(settings, attention_scheme=None), "shared": settings}


def measured(settings, make_job, rounds):
    """Stands for a process of its own: time grows with the square of the length, memory with the length."""
    if settings.sequence_length == 64 and settings.attention_scheme is None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")
    size = settings.batch_size * settings.sequence_length
    return {"seconds": size * settings.sequence_length / 1000, "peak_memory_bytes": size * 2**20}


def test_growth_has_slopes_and_where_memory_ends(monkeypatch, compared, tmp_path):
    monkeypatch.setattr(growth, "measure_alone", measured)
    rows = measure_growth(compared, None, lengths=[16, 32, 64], batch_sizes=[1, 4], rounds=3)
    assert len(rows) == 10
    table = growth_table(rows)
    assert "| 1 × 32 | `shared` | 1.02 s | 2.00 | 0.03 GiB | 1.00 |" in table
    assert "| 4 × 16 | `shared` | 1.02 s | 1.00 | 0.06 GiB | 1.00 |" in table
    assert "| 1 × 64 | `stock` | out of memory |  | out of memory |  |" in table
    draw_growth(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_growth_of_depth_sharing_stands_beside_separate_layers(monkeypatch, compared, tmp_path):
    monkeypatch.setattr(growth, "measure_alone", measured)
    rows = measure_growth({"own": compared["shared"], "shared": compared["shared"]}, None, [16], [], rounds=3)
    table = growth_table(rows)
    assert "| 1 × 16 | `own` |" in table
    assert "| 1 × 16 | `shared` |" in table
    draw_growth(rows, tmp_path / "growth.png")


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch, compared):
    def fails(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(growth, "measure_alone", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        measure_growth(compared, None, [16], [], 1)


def test_packed_documents_have_no_padding_between_them(tokenizers):
    documents = Dataset.from_dict({"text": [TEXT, TEXT[:30]] * 20})
    tokenizer = tokenizers["bert"]
    settings = StepSettings("mlm", 2, 32, "shared", model_fields=(*SHAPE, ("vocab_size", 320)))
    row = compare_packing(settings, documents, tokenizer, rounds=3, warmup=1)
    lengths = [min(32, len(tokenizer(text).input_ids)) for text in documents["text"][:2]]
    assert row["real_share"]["padded"] == pytest.approx(sum(lengths) / 64)
    assert row["real_share"]["packed"] > row["real_share"]["padded"]
    speeds = row["tokens_per_second"]
    assert row["speedup"] == speeds["packed"] / speeds["padded"]


@pytest.mark.parametrize(
    ("scheme", "share"), [("standard", 1), ("query_free", 1), ("shared_kv", 0.5), ("shared", 0.5)]
)
def test_schemes_of_one_stream_cache_half_the_bytes(scheme, share):
    fields = (*SHAPE, ("vocab_size", 64), ("bos_token_id", 1), ("eos_token_id", 2))
    settings = DecodingSettings("clm", 2, 9, scheme, model_fields=fields, new_tokens=3)
    stock = Decoding(replace(settings, attention_scheme=None))
    assert stock.cache_bytes() == 2 * 2 * 2 * 9 * 32 * 4  # layers, streams, batch, tokens, hidden, bytes
    assert Decoding(settings).cache_bytes() == share * stock.cache_bytes()


@pytest.mark.parametrize("arguments", [["encode", "--scheme", "shared", "query_free"], ["memory", "--task", "mlm"]])
def test_commands(arguments, pytestconfig, tmp_path, capsys, monkeypatch):
    output = tmp_path / "result.json"
    main = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "benchmark.py"))["main"]
    monkeypatch.setitem(main.__wrapped__.__globals__, "peak_memory", lambda settings: 10 + settings.batch_size)
    shape = ["--shapes", "2x16", "--model_fields", FIELDS]
    assert main([*arguments, *shape, "--rounds", "2", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result.keys() >= {"hardware", "torch", "commit"}
    for row in result["results"]:
        assert row["settings"]["stock"]["attention_scheme"] is None
    assert capsys.readouterr().out.splitlines()[-1].startswith(("speedup: ", "memory: 1.00"))


def test_growth_has_room_for_the_longest_text(pytestconfig, tmp_path, monkeypatch):
    main = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "benchmark.py"))["main"]
    monkeypatch.setattr(growth, "measure_alone", measured)
    output = tmp_path / "growth.json"
    assert main(["growth", "--lengths", "16", "1024", "--batch_sizes", "1", "--output", str(output)]) == 0
    for row in json.loads(output.read_text())["results"]:
        assert ["max_position_embeddings", 1024] in row["settings"]["model_fields"]
    assert "| 1 × 1024 | `shared` |" in output.with_suffix(".md").read_text()


def test_a_record_is_not_overwritten_by_its_table(pytestconfig, tmp_path, capsys):
    main = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "benchmark.py"))["main"]
    assert main(["encode", "--output", str(tmp_path / "result.md")]) == 2
    assert "must end in .json" in capsys.readouterr().err


def test_a_profile_names_the_operations(compared):
    seconds = efficiency.profile_step(compared["shared"])
    assert {"aten::mm", "aten::_fused_adamw_"} <= seconds.keys()
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)


def test_the_start_ends_with_the_first_loss(pytestconfig):
    module = runpy.run_path(str(pytestconfig.rootpath / "scripts" / "benchmark.py"))
    start = module["seconds_to_first_step"]
    assert start([sys.executable, "-c", "print({'loss': 1.0})"]) > 0
    with pytest.raises(ValueError, match="ended before its first step:\nno such recipe"):
        start([sys.executable, "-c", "print('no such recipe')"])
