"""The script for GPUs runs to its end on a CPU, with tiny shapes."""

import json
import os
import random
import subprocess

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    random.seed(0)
    words = ["".join(random.choices("abcdefghij", k=4)) for _ in range(300)]
    documents = [{"text": " ".join(random.choices(words, k=random.randrange(20, 200)))} for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("part", "files"), [("speed", 8), ("pretrain", 0)])
def test_parts_run_to_their_end(part, files, text, tmp_path, pytestconfig):
    command = ["bash", "scripts/gpu_report.sh", part, str(tmp_path), str(text)]
    environment = {**os.environ, "TINY": "1", "PYTHONPATH": "."}
    subprocess.run(command, cwd=pytestconfig.rootpath, env=environment, check=True, timeout=900)
    results = [json.loads(path.read_text())["results"] for path in tmp_path.glob("*.json")]
    assert len(results) == files
    assert all(results)
    assert "```" in (tmp_path / "report.md").read_text()
    if part == "pretrain":
        assert (tmp_path / "pretrain" / "loss_curve.png").exists()


def test_an_unknown_part_is_named(tmp_path, pytestconfig):
    command = ["bash", "scripts/gpu_report.sh", "sped", str(tmp_path / "new")]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert done.returncode != 0
    assert "sped" in done.stderr
    assert not (tmp_path / "new").exists()
