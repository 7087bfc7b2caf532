"""lm-eval scores our decoder through its Hugging Face backend with the model's own log-likelihoods."""

import json

import pytest
import torch

import shared_bert

from ..conftest import ATTENTION

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

QUESTIONS = [
    {"question": "the fox", "choices": [" hunts .", " barks ."], "answer": 0},
    {"question": "the owl", "choices": [" naps .", " sees ."], "answer": 1},
    {"question": "the hen", "choices": [" lays .", " stands ."], "answer": 0},
]


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)
    return sum(scores[0, i - 1, ids[0, i]].item() for i in range(start, ids.shape[1]))


@pytest.mark.parametrize("name", ["shared", "query_free", "masa"])
def test_log_likelihoods_of_a_task(name, save, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer, _ = save(shared_bert.SharedGptForCausalLM, **ATTENTION[name])
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    # It would read the thousands of tasks that come with it.
    manager = TaskManager(include_defaults=False)
    results = simple_evaluate(scorer, tasks=[task], task_manager=manager, bootstrap_iters=0)
    right = 0
    for sample, row in zip(results["samples"]["animals"], QUESTIONS, strict=True):
        expected = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        got = [response[0][0] for response in sample["resps"]]
        assert got == pytest.approx(expected, rel=1e-4)
        right += expected.index(max(expected)) == row["answer"]
    assert results["results"]["animals"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
