"""Half a download is never taken for a whole one, and two processes do not disturb each other."""

import subprocess

import pytest
import transformers

from . import upstream


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(upstream, "CACHE", tmp_path)
    return tmp_path / f"transformers-{transformers.__version__}"


def breaks_off(into):
    (into / "tests").mkdir(parents=True)
    raise subprocess.CalledProcessError(1, "any", stderr="the line went dead\n")


def test_what_breaks_off_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(upstream, "WAYS", {"git": breaks_off, "pip": breaks_off})
    with pytest.raises(OSError, match="git: the line went dead; pip: the line went dead"):
        upstream.fetch()
    assert not list(cache.parent.iterdir())


def test_the_first_of_two_processes_wins(cache, monkeypatch):
    def slower_than_another(into):
        for folder, who in ((cache, "first"), (into, "second")):
            (folder / "tests").mkdir(parents=True)
            (folder / "tests" / who).touch()

    monkeypatch.setattr(upstream, "WAYS", {"git": breaks_off, "pip": slower_than_another})
    assert [file.name for file in (upstream.fetch() / "tests").iterdir()] == ["first"]
    assert list(cache.parent.iterdir()) == [cache]
