"""The command line before `cli.main`, while torch is imported: Ctrl-C ends the process at once, errors are a sentence.

Python's own way, an exception, is lost or a traceback there. Nothing is done in any other process.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_name = (getattr(sys, "argv", None) or [""])[0]  # "-m": of this package, which is imported before its __main__
_is_command = _name == "-m" or os.path.basename(_name).removesuffix(".exe") == "mambaout-kernels"
_taken = _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
if _taken:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_an_exception() -> None:
    """As in any Python process."""
    if _taken:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def errors_are_sentences() -> Iterator[None]:
    """Of the command line: a ValueError inside ends the process with exit status 2."""
    try:
        yield
    except ValueError as error:
        if not _is_command:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
