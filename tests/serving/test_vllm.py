"""vLLM answers what the models compute: natively, from the code of a checkpoint, and exported.

It pins other versions than this package is tested with, so it has an environment of its own, whose Python VLLM_PYTHON
names; shared_bert/serving/README.md has the commands that make it.
"""

import json
import os
import subprocess
from pathlib import Path

import openai
import pytest
import torch

import shared_bert
from shared_bert.hub.uploads import stage_checkpoint

from ..conftest import ATTENTION
from ..ecosystem.conftest import random_model

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="VLLM_PYTHON names no Python with vLLM: see shared_bert/serving/README.md"
    ),
]
ROWS = [[5, 6, 7, 8, 9, 11], [9, 3, 2], [4] * 9]
# Of a CPU's memory, too; nearly all of it by default.
MEMORY = ["--gpu-memory-utilization", "0.2"]
# vLLM's attention takes heads of 64 channels on a CPU. With three layers vLLM does not take the coefficients' network
# for a table of words: type_vocab_size is two.
SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 320}


@torch.no_grad()
def expected(model, task: str) -> list:
    """What `run_vllm` should answer."""
    rows = [torch.tensor([row]) for row in ROWS]
    if task == "generate":
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
        return [model.generate(row, **options)[0, row.shape[1] :].tolist() for row in rows]
    if task == "embed":
        first_tokens = torch.cat([model(row).last_hidden_state[:, 0] for row in rows])
        return torch.nn.functional.normalize(first_tokens).tolist()
    return torch.cat([model(row).logits.softmax(dim=-1) for row in rows]).tolist()


TASKS = {
    "generate": shared_bert.SharedGptForCausalLM,
    "embed": shared_bert.SharedBertModel,
    "classify": shared_bert.SharedBertForSequenceClassification,
    "classify_gpt": shared_bert.SharedGptForSequenceClassification,
}
NATIVE = [(task, attention, "native") for task in ("generate", "embed") for attention in ATTENTION]
NATIVE += [(task, attention, "native") for task in ("classify", "classify_gpt") for attention in ("shared", "masa")]
CASES = NATIVE + [(task, "shared", how) for task in ("generate", "embed") for how in ("code", "stock")]


@pytest.fixture(scope="module")
def compared(tokenizers, tmp_path_factory) -> dict[tuple, tuple[list, list]]:
    """What vLLM answers and what is expected of every case, whose models are loaded in two processes."""
    root = tmp_path_factory.mktemp("vllm")
    jobs, right = {}, {}
    for case in CASES:
        task, attention, how = case
        cls, folder = TASKS[task], root / "-".join(case)
        kind = "gpt" if cls.config_class is shared_bert.SharedGptConfig else "bert"
        labels = {"num_labels": 3} if "classify" in task else {}
        shape = SHAPE | ({"num_key_value_heads": 1} if attention == "grouped" else {})
        model = random_model(kind, cls, **ATTENTION[attention] | shape, **labels)
        saved = shared_bert.to_stock(model) if how == "stock" else model
        saved.save_pretrained(folder)
        tokenizers[kind].save_pretrained(folder)
        if how == "code":
            saved, folder = folder, root / "-".join([*case, "staged"])
            folder.mkdir()
            stage_checkpoint(saved, folder, "user/model")
        name = task.removesuffix("_gpt")
        options = {"trust_remote_code": True} if how == "code" else {}
        jobs[case] = {"folder": str(folder), "task": name, "rows": ROWS, **options}
        right[case] = expected(model, name)
    answers = {}
    for with_plugin in (True, False):
        chosen = {"-".join(case): job for case, job in jobs.items() if (case[2] != "code") == with_plugin}
        answers |= run(chosen, root, {} if with_plugin else {"VLLM_PLUGINS": "", "HF_HOME": str(root)})
    return {case: (answers["-".join(case)], right[case]) for case in CASES}


def run(jobs: dict, folder: Path, environment: dict[str, str]) -> dict:
    files = folder / "jobs.json", folder / "answers.json"
    files[0].write_text(json.dumps(jobs))
    script = Path(__file__).with_name("run_vllm.py")
    with (folder / "log").open("w") as log:
        command = [PYTHON, script, *files]
        subprocess.run(command, env=os.environ | environment, stdout=log, stderr=log, check=True, timeout=1200)
    return json.loads(files[1].read_text())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_answers_are_those_of_the_model(compared, case):
    answer, right = compared[case]
    assert not isinstance(answer, str), answer
    if case[0] == "generate":
        assert answer == right
    else:
        torch.testing.assert_close(torch.tensor(answer), torch.tensor(right), rtol=1e-4, atol=1e-5)


def test_a_server_streams(serve, tokenizers, tmp_path):
    model = random_model("gpt", attention_scheme="shared", **SHAPE)
    model.save_pretrained(tmp_path / "model")
    tokenizers["gpt"].save_pretrained(tmp_path / "model")
    server = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", tmp_path / "model"]
    url = serve([*server, "--enforce-eager", "--dtype", "float32", "--max-model-len", "32", *MEMORY])
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    request = {"model": str(tmp_path / "model"), "prompt": ROWS[0], "max_tokens": 8, "temperature": 0}
    more = {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
    (whole,) = client.completions.create(**request, **more).choices
    assert whole.token_ids == expected(model, "generate")[0]
    parts = client.completions.create(**request, **more, stream=True)
    assert [token for part in parts for choice in part.choices for token in choice.token_ids or []] == whole.token_ids
