"""Servers on this machine: started, asked and stopped by a test."""

import contextlib

import pytest

from shared_bert.evaluation.serving_load import served


@pytest.fixture
def serve(tmp_path):
    """Starts a server by a command on a free port, and stops it after the test; gives its address."""
    with contextlib.ExitStack() as servers:
        yield lambda command: servers.enter_context(served([str(word) for word in command], tmp_path / "server.log"))
