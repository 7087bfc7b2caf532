"""How scripts parse their arguments and report user errors."""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from transformers import HfArgumentParser

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


class RaisingParser(HfArgumentParser):
    """`HfArgumentParser` that raises a ValueError where argparse would print its usage and exit."""

    def error(self, message):
        raise ValueError(message)


def reports_user_errors(main: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
    """Wrap a script's `main(arguments)` to print user errors as one line and return an exit status.

    Invalid input, a full disk, a missing package and a diverged run print to stderr, after the script's name, and
    return 2; all other errors keep their traceback, and all errors do under `python -X dev`.
    """
    script = Path(main.__code__.co_filename).name

    @wraps(main)
    def reporting(arguments: list[str]) -> int:
        try:
            main(arguments)
        except USER_ERRORS as error:
            if sys.flags.dev_mode:
                raise
            print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return reporting
