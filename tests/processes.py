"""Python commands in processes that start within milliseconds.

Each process is forked from a server that has imported the libraries, but not this package, and has done nothing else.
It has the environment and the folder that it is given, as a new interpreter would.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])


def shared_number():
    """Return an integer that a process and the one that started it share."""
    return _SERVER.Value("i", 0, lock=False)


def start(target: Callable, *arguments, log: Path, environment: dict[str, str] | None = None, cwd: Path | None = None):
    """Start `target(*arguments)`, a function of a module, in a process of its own.

    Args:
        log: a file for stderr; stdout goes to the same name with ".stdout".
        environment: all of it; that of this process by default.
    """
    environment = dict(os.environ) if environment is None else environment
    process = _SERVER.Process(target=_child, args=(target, arguments, environment, log, cwd or Path.cwd()))
    process.start()
    return process


def wait(process, log: Path, timeout: int = 120) -> int:
    """Return the exit status of a process, negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"a process hangs: {log.read_text()[-2000:]}")
    return process.exitcode


def run_python(
    *command,
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
    processes: int = 1,
    timeout: int = 120,
) -> subprocess.CompletedProcess:
    """Run `python *command`: a script and its arguments, or "-c", code and its arguments.

    Args:
        environment: all of it; that of this process by default.
        processes: of torch.distributed, as `torchrun --nproc_per_node` starts them.
        timeout: seconds after which it counts as hanging.

    Returns:
        The status of the first process that failed, if any, and the output of all.
    """
    environment = dict(os.environ if environment is None else environment)
    command = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"log-{rank}") for rank in range(processes)]
        told = rendezvous(processes) if processes > 1 else [{}]
        started = [
            start(interpret, command, log=log, environment={**environment, **told[rank]}, cwd=cwd)
            for rank, log in enumerate(logs)
        ]
        statuses = [wait(process, log, timeout) for process, log in zip(started, logs, strict=True)]
        stdout = "".join(log.with_name(f"{log.name}.stdout").read_text() for log in logs)
        stderr = "".join(log.read_text() for log in logs)
    return subprocess.CompletedProcess(command, next(filter(None, statuses), 0), stdout, stderr)


@cache
def launcher_environment(config_file: str) -> dict[str, str]:
    """Return what `accelerate launch` with a file of configs/accelerate adds to the environment of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        script, told = Path(folder, "script.py"), Path(folder, "environment.json")
        script.write_text(
            f"import json, os\nwith open({str(told)!r}, 'w') as file:\n    json.dump(dict(os.environ), file)"
        )
        config = ROOT / "configs" / "accelerate" / config_file
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        subprocess.run([*launch, "--num_processes", "1", str(script)], check=True, capture_output=True, timeout=120)
        environment = json.loads(told.read_text())
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_", "OMP_"))}


def rendezvous(processes: int) -> list[dict[str, str]]:
    """Return what a launcher adds to the environment of each process of torch.distributed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"MASTER_ADDR": "localhost", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": processes}
    ranks = [
        {**common, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
        for rank in range(processes)
    ]
    return [{name: str(value) for name, value in of_rank.items()} for of_rank in ranks]


def _child(target, arguments, environment, log, cwd):
    for number, name in ((1, f"{log}.stdout"), (2, log)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _read_environment_again()
    target(*arguments)


def _read_environment_again():
    """Set what the libraries have read from the environment when they were imported."""
    import datasets
    import huggingface_hub
    import torch
    import transformers

    # datasets put the folder of the user's own cache there, whose modules would be found first.
    sys.path[:] = [path for path in sys.path if path != datasets.config.HF_MODULES_CACHE]
    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    modules = os.path.join(huggingface_hub.constants.HF_HOME, "modules")
    for module in (transformers.utils.hub, transformers.dynamic_module_utils):
        module.HF_MODULES_CACHE = os.environ.get("HF_MODULES_CACHE", modules)
    torch.set_num_threads(1)


def interpret(command: list[str]):
    """Do what `python *command` does."""
    first, *arguments = command
    if first == "-c":
        code, *arguments = arguments
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *arguments]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
