"""How scripts read their arguments and report what their users can mend."""

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
    """Makes a script's `main(arguments)` return an exit status, and print wrong input as one line instead of raising.

    Wrong input, a full disk, a package that is missing and a run that diverged are told to stderr, after the script's
    name, with the status 2; all other errors keep their traceback. Under `python -X dev` all do.
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
