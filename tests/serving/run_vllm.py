"""Runs in an environment that has vLLM: answers for every folder, one after the other.

python run_vllm.py JOBS.json ANSWERS.json
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


def answer(folder: str, task: str, rows: list[list[int]], **options) -> list:
    """Return the generated tokens, the embedding or the classes' probabilities of each row of tokens."""
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=32, **options)
    prompts = [{"prompt_token_ids": row} for row in rows]
    if task == "generate":
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, GREEDY)]
    if task == "embed":
        return [output.outputs.embedding for output in llm.embed(prompts)]
    return [output.outputs.probs for output in llm.classify(prompts)]


if __name__ == "__main__":
    jobs, answers = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, job in jobs.items():
        try:
            answers[name] = answer(**job)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        gc.collect()
    Path(sys.argv[2]).write_text(json.dumps(answers))
