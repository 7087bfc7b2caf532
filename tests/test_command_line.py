"""What a script's user can mend is one line; what he cannot keeps its traceback."""

import runpy
import sys
from pathlib import Path

import pytest

from shared_bert.command_line import USER_ERRORS, reports_user_errors

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("error", USER_ERRORS)
def test_one_line(capsys, error):
    @reports_user_errors
    def main(arguments):
        raise error(f"{arguments} over\n   two lines")

    assert main(["a"]) == 2
    assert capsys.readouterr().err == "test_command_line.py: ['a'] over two lines\n"


def test_success_and_other_errors():
    @reports_user_errors
    def main(arguments):
        if arguments:
            raise KeyError("a mistake of ours")

    assert main([]) == 0
    with pytest.raises(KeyError):
        main(["a"])


def test_the_developer_gets_the_traceback(monkeypatch):
    @reports_user_errors
    def main(arguments):
        raise ValueError("too wide")

    monkeypatch.setattr(sys, "flags", type("Flags", (), {"dev_mode": True}))
    with pytest.raises(ValueError, match="too wide"):
        main([])


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain.py", ["missing.yaml"], "missing.yaml cannot be read"),
        ("pretrain.py", ["--learning_rate", "1"], "no model is named"),
        ("convert.py", ["to-stock", "missing/folder/of/nobody", "out"], "missing/folder/of/nobody"),
        ("count_parameters.py", ["missing.yaml"], "missing.yaml cannot be read"),
        ("benchmark.py", ["train", "--sharing", "num_atoms"], "num_atoms"),
        ("try_model.py", ["missing/folder/of/nobody", "text"], "missing/folder/of/nobody"),
    ],
)
def test_scripts(capsys, tmp_path, monkeypatch, script, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(SCRIPTS / script))["main"](arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{script}: ")
    assert message in line
    assert not list(tmp_path.iterdir())
