"""`torch.export` and ONNX of the models themselves, with any number of rows and tokens."""

import itertools

import pytest
import torch

from ..conftest import ATTENTION, MECHANISMS
from .conftest import random_model

ROWS_AND_TOKENS = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens", max=40)}


def exportable(kind, **fields):
    model = random_model(kind, **fields)
    model.config.use_cache = False
    return model


@pytest.fixture
def export_arguments():
    """An example of another shape than what is run later, and which of its dimensions may change."""
    # Two tensors: of one, export makes one input.
    example = {name: torch.ones(3, 7, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    return {"kwargs": example, "dynamic_shapes": dict.fromkeys(example, ROWS_AND_TOKENS)}


@pytest.mark.parametrize("name", MECHANISMS)
def test_torch_export(kind, name, export_arguments, padded_batch):
    model = exportable(kind, **ATTENTION[name])
    exported = torch.export.export(model, (), **export_arguments).module()
    with torch.no_grad():
        expected = model(**padded_batch).logits
        torch.testing.assert_close(exported(**padded_batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's exporter, of torch
@pytest.mark.parametrize(("name", "kind"), list(zip(MECHANISMS, itertools.cycle(["bert", "gpt"]), strict=False)))
def test_onnx(name, kind, export_arguments, padded_batch, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the package onnxscript")
    model = exportable(kind, **ATTENTION[name])
    file = tmp_path / "model.onnx"
    names = list(export_arguments["kwargs"])
    torch.onnx.export(model, (), file, **export_arguments, input_names=names, output_names=["logits"], verbose=False)
    session = onnxruntime.InferenceSession(file)
    (got,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in padded_batch.items()})
    with torch.no_grad():
        expected = model(**padded_batch).logits
    is_text = padded_batch["attention_mask"] == 1
    torch.testing.assert_close(torch.from_numpy(got)[is_text], expected[is_text], rtol=1e-4, atol=1e-4)
