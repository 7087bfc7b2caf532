"""Size and speed of sentence encoders where they are deployed: in torch, ONNX Runtime and OpenVINO, on a CPU.

Every runtime gets the same graph, whose output is the sentence embedding, and as many threads as torch. The models
take turns in all runtimes, so that a noisy machine slows all of them alike.
"""

import statistics
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from ..conversion import from_stock, to_stock
from .efficiency import take_turns
from .tables import markdown_table

# Rows, and tokens per row.
LATENCY = (1, 16)
THROUGHPUT = (8, 128)
# One after the other in a turn: the first call finds the weights of another model in the CPU's cache.
LATENCY_CALLS = 10
CONVERSIONS = {
    "shared_kv": {"attention_scheme": "shared_kv"},
    "shared": {"attention_scheme": "shared"},
    "masa, S = 3": {"depth_sharing": "masa", "num_atoms": 3},
}
_INPUTS = ("input_ids", "attention_mask")


class SentenceEncoder(nn.Module):
    """A base model whose output is the mean of the last hidden states, scaled to length one: [rows, hidden].

    Its inputs are the token ids and the mask, both [rows, tokens].
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        is_text = attention_mask.unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * is_text).sum(1) / is_text.sum(1), dim=-1)


@dataclass(frozen=True)
class Deployed:
    """A model in a runtime.

    Args:
        embed: takes token ids and mask [rows, tokens], and returns embeddings [rows, hidden].
        file_bytes: the size of the files that the runtime loads.
    """

    embed: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    file_bytes: int


@dataclass(frozen=True)
class Runtime:
    """How a model comes into a runtime.

    Args:
        deploy: takes the model and a folder for its files; the runtimes of one model share the folder.
        packages: that it imports.
        extra: of this package, which installs them.
    """

    deploy: Callable[[PreTrainedModel, Path], Deployed]
    packages: tuple[str, ...] = ()
    extra: str = ""

    def missing(self) -> str | None:
        """Return which packages are missing and what installs them, or None."""
        names = [name for name in self.packages if find_spec(name) is None]
        return f"needs {' and '.join(names)}: pip install 'shared_bert[{self.extra}]'" if names else None


def _torch(model: PreTrainedModel, folder: Path) -> Deployed:
    saved = folder / "torch"
    model.save_pretrained(saved)
    return _in_torch(model, saved)


def _torch_int8(model: PreTrainedModel, folder: Path) -> Deployed:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model.save_pretrained(folder / "torch")
    config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    quantized = type(model).from_pretrained(folder / "torch", quantization_config=config)
    saved = folder / "torch_int8"
    quantized.save_pretrained(saved)
    return _in_torch(quantized, saved)


def _in_torch(model: PreTrainedModel, saved: Path) -> Deployed:
    encoder = SentenceEncoder(model).eval()

    @torch.no_grad()
    def embed(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return encoder(input_ids, attention_mask)

    return Deployed(embed, _total_bytes(saved, "*.safetensors"))


def _onnx(model: PreTrainedModel, folder: Path) -> Deployed:
    return _in_onnxruntime(_onnx_file(model, folder))


def _onnx_int8(model: PreTrainedModel, folder: Path) -> Deployed:
    from onnxruntime.quantization import quant_pre_process, quantize_dynamic

    # Matrices that are computed from weights, as MASA's are, are quantised only after they have become constants.
    folded, quantized = folder / "onnx_folded" / "model.onnx", folder / "onnx_int8" / "model.onnx"
    for file in (folded, quantized):
        file.parent.mkdir()
    quant_pre_process(_onnx_file(model, folder), folded, skip_symbolic_shape=True)
    # With one scale for a whole matrix, the embeddings would move two to three times as far.
    quantize_dynamic(folded, quantized, per_channel=True)
    return _in_onnxruntime(quantized)


def _onnx_file(model: PreTrainedModel, folder: Path) -> Path:
    file = folder / "onnx" / "model.onnx"
    if not file.exists():
        file.parent.mkdir()
        encoder, arguments = _export_arguments(model)
        names = {"input_names": _INPUTS, "output_names": ["embeddings"]}
        # In one file, up to 2 GB: `quant_pre_process` cannot read data that lie outside.
        torch.onnx.export(encoder, (), file, **arguments, **names, dynamo=True, verbose=False, external_data=False)
    return file


def _in_onnxruntime(file: Path) -> Deployed:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def embed(*inputs: torch.Tensor) -> torch.Tensor:
        arrays = {name: tensor.numpy() for name, tensor in zip(_INPUTS, inputs, strict=True)}
        return torch.from_numpy(session.run(["embeddings"], arrays)[0])

    return Deployed(embed, _total_bytes(file.parent, "*"))


def _openvino(model: PreTrainedModel, folder: Path) -> Deployed:
    return _in_openvino(_openvino_file(model, folder))


def _openvino_int8(model: PreTrainedModel, folder: Path) -> Deployed:
    import nncf
    import openvino

    file = folder / "openvino_int8" / "model.xml"
    weights_as_int8 = nncf.compress_weights(openvino.Core().read_model(_openvino_file(model, folder)))
    openvino.save_model(weights_as_int8, file, compress_to_fp16=False)
    return _in_openvino(file)


def _openvino_file(model: PreTrainedModel, folder: Path) -> Path:
    import openvino

    file = folder / "openvino" / "model.xml"
    if not file.exists():
        encoder, arguments = _export_arguments(model)
        graph = openvino.convert_model(torch.export.export(encoder, (), **arguments))
        openvino.save_model(graph, file, compress_to_fp16=False)
    return file


def _in_openvino(file: Path) -> Deployed:
    import openvino

    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else CPUs that have bfloat16 compute in it
    }
    compiled = openvino.Core().compile_model(file, "CPU", properties)

    def embed(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs])[0].copy())

    return Deployed(embed, _total_bytes(file.parent, "*"))


def _export_arguments(model: PreTrainedModel) -> tuple[SentenceEncoder, dict[str, Any]]:
    """Return the encoder and how to export it for any number of rows and tokens."""
    # Two tensors and an odd shape: exporters take what is equal in the example for what must be equal.
    example = {name: torch.ones(3, 7, dtype=torch.long) for name in _INPUTS}
    rows = torch.export.Dim("rows")
    tokens = torch.export.Dim("tokens", max=model.config.max_position_embeddings)
    shapes = {name: {0: rows, 1: tokens} for name in _INPUTS}
    return SentenceEncoder(model).eval(), {"kwargs": example, "dynamic_shapes": shapes}


def _total_bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


_ONNX = ("onnx", "onnxruntime", "onnxscript")
RUNTIMES = {
    "torch": Runtime(_torch),
    "torch int8": Runtime(_torch_int8, ("torchao",), "ecosystem"),
    "ONNX Runtime": Runtime(_onnx, _ONNX, "export"),
    "ONNX Runtime int8": Runtime(_onnx_int8, _ONNX, "export"),
    "OpenVINO": Runtime(_openvino, ("openvino",), "openvino"),
    "OpenVINO int8": Runtime(_openvino_int8, ("openvino", "nncf"), "openvino"),
}


def deployed_models(original: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return by name a stock BERT, its `CONVERSIONS`, and each of them as a stock model again.

    The conversions are neither aligned nor healed: only their size and speed are those of good ones.
    """
    models = {"original": original}
    for name, options in CONVERSIONS.items():
        converted, _ = from_stock(original, align=False, **options)
        models |= {name: converted, f"{name}, exported": to_stock(converted)}
    return models


def measure_deployment(
    models: Mapping[str, PreTrainedModel], runtimes: Collection[str] = tuple(RUNTIMES), rounds: int = 9
) -> dict[str, Any]:
    """Measure encoders in several runtimes on random tokens, in turns.

    Args:
        models: base models by name, in float32 on the CPU.
        runtimes: of `RUNTIMES`. Those whose packages are missing are left out.
        rounds: turns of each model in each runtime; the results are medians.

    Returns:
        The settings; `skipped`, by runtime what is missing; and in `rows` one for each runtime and model:
        `file_bytes`; `latency_ms` of a call and `tokens_per_second`; the `latency_seconds` and `throughput_seconds`
        of a call in each round; `difference`, the largest between an entry of the embeddings of the throughput's
        batch and that of the same model in torch in float32.
    """
    skipped = {name: RUNTIMES[name].missing() for name in runtimes}
    skipped = {name: reason for name, reason in skipped.items() if reason}
    batches = {shape: _random_batch(models.values(), shape) for shape in (LATENCY, THROUGHPUT)}
    with tempfile.TemporaryDirectory() as folder:
        deployed = {}
        for i, (name, model) in enumerate(models.items()):
            of_model = Path(folder, str(i))
            of_model.mkdir()
            for runtime in runtimes:
                if runtime not in skipped:
                    deployed[runtime, name] = RUNTIMES[runtime].deploy(model.eval(), of_model)
        latency = _seconds_per_call(deployed, batches[LATENCY], rounds, LATENCY_CALLS)
        throughput = _seconds_per_call(deployed, batches[THROUGHPUT], rounds, 1)
        with torch.no_grad():
            expected = {name: SentenceEncoder(model)(*batches[THROUGHPUT]) for name, model in models.items()}
        differences = {
            key: (encoder.embed(*batches[THROUGHPUT]) - expected[key[1]]).abs().max().item()
            for key, encoder in deployed.items()
        }
    rows = [
        {
            "runtime": runtime,
            "model": name,
            "file_bytes": deployed[runtime, name].file_bytes,
            "latency_ms": 1000 * statistics.median(latency[runtime, name]),
            "tokens_per_second": THROUGHPUT[0] * THROUGHPUT[1] / statistics.median(throughput[runtime, name]),
            "latency_seconds": latency[runtime, name],
            "throughput_seconds": throughput[runtime, name],
            "difference": differences[runtime, name],
        }
        for runtime in runtimes
        if runtime not in skipped
        for name in models
    ]
    shapes = {"latency": LATENCY, "throughput": THROUGHPUT}
    return {"rounds": rounds, "shapes": shapes, "skipped": skipped, "rows": rows}


def _random_batch(models: Collection[PreTrainedModel], shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    vocab_size = min(model.config.vocab_size for model in models)
    input_ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return input_ids, torch.ones_like(input_ids)


def _seconds_per_call(
    deployed: Mapping[Any, Deployed], batch: tuple[torch.Tensor, torch.Tensor], rounds: int, calls: int
) -> dict[Any, list[float]]:
    """Return the seconds of a call of each in every round."""

    def turn(encoder: Deployed):
        for _ in range(calls):
            encoder.embed(*batch)

    jobs = {key: lambda encoder=encoder: turn(encoder) for key, encoder in deployed.items()}
    times = take_turns(jobs, rounds, warmup=2)
    return {key: [seconds / calls for seconds in measured] for key, measured in times.items()}


def deployment_table(result: dict[str, Any]) -> str:
    """Format the result of `measure_deployment` as a Markdown table, its settings above it.

    Ratios compare a model with the first one in the same runtime; above 1 it is larger, or faster.
    """
    latency, throughput = ("{} × {}".format(*shape) for shape in result["shapes"].values())
    caption = (
        f"Latency of {latency} tokens, throughput at {throughput}; medians of {result['rounds']} rounds. In brackets: "
        "the size and the speed next to the first model in the same runtime. The difference is the largest from the "
        "embeddings, of length one, of the same model in torch in float32."
    )
    rows, first = [], {}
    for row in result["rows"]:
        reference = first.setdefault(row["runtime"], row)
        cells = [
            row["runtime"],
            row["model"],
            f"{row['file_bytes'] / 1e6:.1f} ({row['file_bytes'] / reference['file_bytes']:.2f}×)",
            f"{row['latency_ms']:.2f} ({reference['latency_ms'] / row['latency_ms']:.2f}×)",
            f"{row['tokens_per_second']:,.0f} ({row['tokens_per_second'] / reference['tokens_per_second']:.2f}×)",
            f"{row['difference']:.1e}",
        ]
        rows.append(cells)
    table = markdown_table(["runtime", "model", "MB", "latency, ms", "tokens/s", "difference"], rows)
    left_out = (f"\n{runtime} was left out: it {reason}\n" for runtime, reason in result["skipped"].items())
    return f"{caption}\n\n{table}{''.join(left_out)}"
