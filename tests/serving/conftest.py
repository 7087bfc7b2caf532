"""Servers on this machine: started, asked and stopped by a test."""

import contextlib
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest

START_SECONDS = 300


@pytest.fixture
def serve(tmp_path):
    """Starts a server by a command on a free port, and stops it; gives its address."""
    with contextlib.ExitStack() as servers:
        yield lambda command: servers.enter_context(_served(command, tmp_path / "server.log"))


@contextlib.contextmanager
def _served(command: list[str], log: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        arguments = [*map(str, command), "--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(arguments, stdout=output, stderr=output)
    try:
        for _ in range(START_SECONDS):
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"the server stopped with {process.wait(1)}: {log.read_text()[-3000:]}")
            if _answers(f"http://127.0.0.1:{port}/health"):
                break
        else:
            raise AssertionError(f"the server does not answer: {log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
