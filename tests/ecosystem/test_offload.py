"""Models whose weights wait elsewhere: accelerate's hooks bring those of a module when it is called."""

import copy

import pytest
import torch

from shared_bert import fix_coefficients, from_stock, to_stock

from ..conftest import ATTENTION
from .conftest import random_model

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")


@pytest.mark.parametrize("convert", [to_stock, fix_coefficients, lambda model: from_stock(model, "shared")])
def test_weights_that_are_elsewhere_are_not_converted(kind, convert):
    model = random_model(kind, **ATTENTION["masa_network"])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded: load all of them first"):
        convert(model)


def by_device_map(model, folder):
    """Loads with part of the model on the CPU and the rest on disk."""
    model.save_pretrained(folder)
    room = sum(parameter.nbytes for parameter in model.parameters()) * 4 // 5
    options = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": folder / "offload"}
    loaded = type(model).from_pretrained(folder, **options)
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    return loaded


def to_cpu(model, folder):
    return accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))


def to_disk(model, folder):
    return accelerate.disk_offload(copy.deepcopy(model), folder, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [by_device_map, to_cpu, to_disk])
def test_an_offloaded_model_computes_the_same(kind, attention, offload, input_ids, tmp_path):
    model = random_model(kind, **attention)
    offloaded = offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    with torch.no_grad():
        expected = model(input_ids, labels=input_ids)
        for _ in range(2):
            out = offloaded(input_ids, labels=input_ids)
            torch.testing.assert_close(out.loss, expected.loss)
            torch.testing.assert_close(out.logits, expected.logits)
    if kind == "gpt":
        written, wanted = (m.generate(input_ids, max_new_tokens=4, do_sample=False) for m in (offloaded, model))
        assert torch.equal(written, wanted)
