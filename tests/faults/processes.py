"""Jobs in processes of their own that are killed at an event of the caller's choice."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..processes import shared_number, start, wait


def run_job(job: Callable, *arguments, kill_at: int | None = None, log: Path, cache: Path) -> tuple[int, int]:
    """Run `job(*arguments)` in a process of its own.

    Args:
        kill_at: the number of the event at which the process kills itself with SIGKILL: a file that is opened to be
            written, renamed or removed, half of a tensor file written, or an optimizer step.
        log: a file for its output.
        cache: of data sets.

    Returns:
        The exit status, negative for a signal, and the number of events.
    """
    events = shared_number()
    process = start(_run, job, arguments, kill_at, events, log, cache, log=log)
    return wait(process, log), events.value


def assert_same(found: Path, expected: Path):
    """The models of two folders, each computed by itself, have the same finite weights up to rounding."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.isfinite().all()
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def _run(job, arguments, kill_at, events, log, cache):
    os.dup2(2, 1)  # one file for both
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache

    def is_last() -> bool:
        events.value += 1
        return events.value == kill_at

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    _watch_files(is_last, die)
    _watch_tensors(is_last, die)
    _watch_steps(is_last, die)
    job(*arguments)


def _watch_files(is_last, die):
    def hook(event, details):
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile")
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and not str(details[0]).startswith("/dev/") and is_last():
            die()

    sys.addaudithook(hook)


def _watch_tensors(is_last, die):
    import safetensors.torch
    import transformers.modeling_utils

    def halving(save):
        def save_or_die(content, path, *args, **kwargs):
            save(content, path, *args, **kwargs)
            if is_last():
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        return save_or_die

    torch.save = halving(torch.save)
    transformers.modeling_utils.safe_save_file = halving(safetensors.torch.save_file)


def _watch_steps(is_last, die):
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if is_last():
                die()

    transformers.trainer.DEFAULT_CALLBACKS.append(Watch)
