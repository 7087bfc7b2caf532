"""Conversions of a decoder are measured once each, and the table has all of them."""

import copy
import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from shared_bert.evaluation.decoder_conversions import DecoderConversions

TEXT = "Return the mean of the array, and nothing else but the mean."
PAIRS = [{"sentence_good": "the mean", "sentence_bad": "mean the", "UID": "order"}]


def test_records_are_kept_and_names_checked(tmp_path, tokenizers):
    tokenizer = copy.deepcopy(tokenizers["gpt"])
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=1024)).eval()
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{number} {TEXT}"}) for number in range(2000)))
    experiment = DecoderConversions(model, tokenizer, [TEXT], PAIRS, str(text), heal_steps=1, calibration_tokens=512)
    with pytest.raises(ValueError, match="no conversion is named 'mosa'; there are masa; "):
        experiment.run(tmp_path / "out", [0.2], ["mosa"])
    with pytest.raises(ValueError, match=r"saved=0\.9 leaves"):
        experiment.run(tmp_path / "out", [0.9])
    assert not (tmp_path / "out").exists()
    for names in (["low_rank"], ["low_rank", "sequential"]):  # the second time a record is there
        experiment.run(tmp_path / "out", [0.2], names)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["low_rank", "sequential"]
    for row in rows:
        assert row["saved"] == pytest.approx(0.2, abs=0.1)
        assert row["healing"]["tokens"] == 8 * 512
        assert f"| `{row['name']}` |" in (tmp_path / "out" / "results.md").read_text()
