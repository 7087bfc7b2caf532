"""What a comparison costs, and how fast its variants train."""

import statistics

import torch

from ...modeling.losses import IGNORED
from ..efficiency import environment, quartiles, take_turns
from ..records import save_record
from .comparison import Comparison, Variant, non_embedding
from .records import read_record, record_path, speed_path


def cost_report(comparison: Comparison) -> str:
    """Return what the runs without a record will cost, by what others took here, or by the speed of the first."""
    lines = [f"{'variant':24}{'parameters':>12}{'outside embeddings':>20}{'share':>8}{'MFLOP/token':>13}"]
    whole = non_embedding(comparison.costs[comparison.baseline])
    for variant in comparison.variants:
        cost = comparison.costs[variant.name]
        outside = non_embedding(cost)
        lines.append(
            f"{variant.name:24}{cost.total:12,}{outside:20,}{outside / whole:8.1%}{3 * cost.forward_flops / 1e6:13.1f}"
        )
    open_runs = [run for run in comparison.runs() if not record_path(comparison, run).exists()]
    swept = sum(bool(run.tuned) for run in open_runs)
    flops = sum(map(comparison.flops_of, open_runs))
    tokens = comparison.tokens_of(comparison.runs()[-1])
    lines.append(
        f"{len(open_runs)} of {len(comparison.runs())} runs to do, {swept} of them to choose options by; each reads "
        f"{tokens:,} tokens. Training takes {flops:.2e} FLOPs."
    )
    if finished := _finished_speed(comparison):
        lines.append(f"By the runs that are done: about {flops / finished / 3600:.1f} hours of one process.")
    elif open_runs:
        speed = _measured_speed(comparison)
        lines.append(
            f"At {speed / 1e9:.0f} GFLOP/s, as measured: about {flops / speed / 3600:.1f} hours of one process; the "
            "evaluations come on top."
        )
    return "\n".join(lines)


def _finished_speed(comparison: Comparison) -> float | None:
    """Return the FLOPs of training per second of whole runs, with their evaluation; None if none ended here."""
    hardware = environment(comparison.arguments[2].device.type)["hardware"]
    done = [run for run in comparison.runs() if not run.tuned and record_path(comparison, run).exists()]
    records = {run: read_record(comparison, run) for run in done}
    speeds = [
        comparison.flops_of(run) / record["seconds"]
        for run, record in records.items()
        if "seconds" in record and record["hardware"] == hardware
    ]
    return statistics.median(speeds) if speeds else None


class _Step:
    """A variant with its optimizer and a batch of random tokens; a call does one step of training."""

    def __init__(self, comparison: Comparison, variant: Variant):
        _, data_args, training_args = comparison.arguments
        self.device, self.bf16 = training_args.device, training_args.bf16
        self.model = variant.new_model().to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        shape = training_args.per_device_train_batch_size, data_args.block_size
        self.input_ids = torch.randint(comparison.model["vocab_size"], shape, device=self.device)
        self.labels = self.input_ids
        if comparison.objective == "mlm":
            predicted = torch.rand(shape, device=self.device) < data_args.mlm_probability
            self.labels = torch.where(predicted, self.input_ids, IGNORED)

    def __call__(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.model(self.input_ids, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # waits for the device


def _measured_speed(comparison: Comparison) -> float:
    """Return the FLOP/s of training steps of the first variant."""
    variant = comparison.variants[0]
    step = _Step(comparison, variant)
    seconds = statistics.median(take_turns({"": step}, rounds=3, warmup=1)[""])
    return 3 * comparison.costs[variant.name].forward_flops * step.input_ids.numel() / seconds


def measure_speed(comparison: Comparison, rounds: int = 30):
    """Measure the training steps of all variants in turns, and write `speed.json` into `results_dir`."""
    steps = {variant.name: _Step(comparison, variant) for variant in comparison.variants}
    seconds = take_turns(steps, rounds, warmup=2)
    tokens = steps[comparison.baseline].input_ids.numel()
    found = {name: [round(tokens / time) for time in quartiles(times)[::-1]] for name, times in seconds.items()}
    record = {
        "tokens_per_second": {name: values[len(values) // 2] for name, values in found.items()},
        "quartiles": {name: [values[0], values[-1]] for name, values in found.items()},
        "rounds": rounds,
        **environment(comparison.arguments[2].device.type),
    }
    save_record(speed_path(comparison), record)
