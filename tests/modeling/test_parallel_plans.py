"""The parallel plans of the configs: two processes compute what one does."""

import os

import pytest
import torch
from torch import distributed
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from tests.conftest import ATTENTION, LANGUAGE_MODELS, TINY, tiny_model
from tests.processes import rendezvous, start, wait


def tokens() -> torch.Tensor:
    return torch.randint(3, TINY["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))


def in_two_processes(function, folder, *arguments):
    """Run `function(rank, *arguments)` in two processes that know each other, with their logs in `folder`."""
    logs = [folder / f"log-{rank}" for rank in range(2)]
    told = rendezvous(2)
    started = [
        start(_start, function, rank, arguments, log=log, environment={**os.environ, **told[rank]})
        for rank, log in enumerate(logs)
    ]
    for process, log in zip(started, logs, strict=True):
        assert wait(process, log) == 0, log.read_text()


def _start(function, rank, arguments):
    distributed.init_process_group("gloo")
    function(rank, *arguments)
    distributed.destroy_process_group()


def tensor_parallel(rank: int, folder: str):
    for kind in LANGUAGE_MODELS:
        for name, fields in ATTENTION.items():
            model = LANGUAGE_MODELS[kind].from_pretrained(f"{folder}/{kind}_{name}", tp_plan="auto")
            expected = torch.load(f"{folder}/{kind}_{name}.pt")
            with torch.no_grad():
                logits = model(tokens()).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5, msg=f"{kind} {fields}")
            layer = model.base_model.encoder.layer[0] if kind == "bert" else model.base_model.h[0].mlp
            cut = (layer.intermediate.dense if kind == "bert" else layer.c_fc).weight
            assert cut.to_local().shape[0] == TINY["intermediate_size"] // 2


@pytest.mark.slow
def test_tensor_parallel_plan(tmp_path):
    for kind in LANGUAGE_MODELS:
        for name, fields in ATTENTION.items():
            model = tiny_model(kind, **fields)
            model.save_pretrained(tmp_path / f"{kind}_{name}")
            with torch.no_grad():
                torch.save(model(tokens()).logits, tmp_path / f"{kind}_{name}.pt")
    in_two_processes(tensor_parallel, tmp_path, str(tmp_path))


def keep_stage(model, rank: int):
    """Leaves of a model what a stage of two has: the first or the second half of the list that the plan names."""
    base = model.base_model
    # An encoder under a masked language model has no pooler.
    names = [name for name in model.config.base_model_pp_plan if name in dict(base.named_modules())]
    (middle,) = (name for name in names if isinstance(base.get_submodule(name), torch.nn.ModuleList))
    layers = base.get_submodule(middle)
    half = len(layers) // 2
    for i in range(half, len(layers)) if rank == 0 else range(half):
        layers[i] = PipelineIdentityLayer()
    at = names.index(middle)
    for name in names[at + 1 :] if rank == 0 else names[:at]:
        setattr(base, name, PipelineIdentityLayer())


def pipeline(rank: int):
    for kind in LANGUAGE_MODELS:
        for fields in ATTENTION.values():
            model = tiny_model(kind, **fields)
            with torch.no_grad():
                expected = model(tokens()).logits
                keep_stage(model, rank)
                if rank == 0:
                    distributed.send(model.base_model(tokens()).last_hidden_state, 1)
                else:
                    received = torch.empty(2, 12, TINY["hidden_size"])
                    distributed.recv(received, 0)
                    logits = model(inputs_embeds=received).logits
                    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6, msg=f"{kind} {fields}")


@pytest.mark.slow
def test_pipeline_plan(tmp_path):
    in_two_processes(pipeline, tmp_path)


def test_plans_name_modules_that_are_there(kind, attention):
    base = tiny_model(kind, **attention).base_model
    names = dict(base.named_modules())
    for plan in (base.config.base_model_tp_plan, base.config.base_model_pp_plan, base.config.base_model_fsdp_plan):
        for name in plan:
            assert name == "pooler" or name.replace("*", "0") in names
