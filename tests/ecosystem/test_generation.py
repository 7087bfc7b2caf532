"""`generate` with a preallocated cache and a compiled forward writes what plain generation writes."""

import pytest
import torch
from transformers import CompileConfig

from ..conftest import ATTENTION, MECHANISMS, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_compiled_static_cache_writes_the_same(name, input_ids):
    model = tiny_model("gpt", initializer_range=0.3, **ATTENTION[name])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["attention_mask"] = torch.ones_like(input_ids)
    expected = model.generate(input_ids, **options)
    # What is captured is the same for every backend; inductor takes most of the time.
    backend = "inductor" if name in ("shared", "masa_network") else "eager"
    # transformers compiles for an accelerator only, unless it is told to.
    compile_config = CompileConfig(fullgraph=True, backend=backend)
    compile_config._compile_all_devices = True
    compiled = model.generate(input_ids, cache_implementation="static", compile_config=compile_config, **options)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, expected)
    torch._dynamo.reset()
