import sysconfig

import pytest
from datasets import Dataset

from shared_bert.data import load_documents, load_python_docs, python_docs

PROSE = "A docstring needs twenty words before it counts as prose, and so this one goes on about nothing until"


def source(title):
    return f'''
def described():
    """{title} function.

    {PROSE} there are enough.
    """
'''


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """A standard library of two files and one installed library, `toylib`."""
    standard = tmp_path / "standard"
    files = {
        standard / "a.py": f'"""Module. {PROSE} now."""\nclass C:\n    """Short."""\n' + source("First"),
        standard / "test" / "b.py": source("Test"),
        standard / "broken.py": "def (",
        tmp_path / "toylib" / "__init__.py": "raise RuntimeError('imported')\n" + source("First"),
        tmp_path / "toylib" / "c.py": source("Second") + f'"\\d"\nclass D:\n    """{"é" * 30} {PROSE}"""\n',
        tmp_path / "toylib" / "d.py": f'async def f():\n    """\\ud800 {PROSE} there."""\n',
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(python_docs, "LIBRARIES", {"toylib": "numpy", "not_installed": "not-installed"})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(standard))
    return tmp_path


def test_docstrings_with_their_library(libraries):
    docs = load_python_docs(num_proc=1)
    names = docs.features["label"].names
    assert names == ["python", "toylib"]
    rows = [(names[row["label"]], row["text"].split(".")[0][:7]) for row in docs]
    assert rows == [("python", "Module"), ("python", "First f"), ("toylib", "Second "), ("toylib", "? A doc")]
    assert docs[1]["text"].splitlines()[2].startswith(PROSE), "indentation is removed"


def test_built_once(libraries, monkeypatch):
    first = load_python_docs(num_proc=1)
    (libraries / "standard" / "a.py").unlink()
    assert load_python_docs(num_proc=1)["text"][:] == first["text"][:]
    monkeypatch.setattr(python_docs, "READER_VERSION", -1)
    assert len(load_python_docs(num_proc=1)) < len(first)


def test_an_interrupted_build_is_not_taken_for_whole(libraries, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_python_docs(num_proc=1)
    assert len(load_python_docs(num_proc=1)) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_as_a_source_of_documents(libraries, streaming):
    splits = load_documents("python-docs", validation_split=0.5, streaming=streaming)
    rows = [row for split in splits.values() for row in split]
    assert len(rows) == 4
    assert all(row.keys() == {"text", "label"} for row in rows)


@pytest.mark.slow
def test_the_real_documentation(monkeypatch):
    """Of two libraries: all of them take a minute, which the quickstart spends."""
    monkeypatch.setattr(python_docs, "LIBRARIES", {"numpy": "numpy", "networkx": "networkx"})
    docs = load_python_docs()
    assert sum(len(text.split()) for text in docs["text"]) > 500_000
    assert set(docs["label"]) == {0, 1, 2}
    assert docs.features["label"].names == ["python", "numpy", "networkx"]
    assert len(set(docs["text"])) == len(docs)
