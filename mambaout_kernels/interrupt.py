"""Ctrl-C in the command line: until `cli.main` handles it, while torch is imported, it ends the process at once.

Python's own way, an exception, is lost or a traceback there. Nothing is done in any other process.
"""

import os
import signal
import sys

_name = (getattr(sys, "argv", None) or [""])[0]  # "-m": of this package, which is imported before its __main__
_is_command = _name == "-m" or os.path.basename(_name).removesuffix(".exe") == "mambaout-kernels"
_taken = _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where it is ignored
if _taken:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_an_exception() -> None:
    """As in any Python process."""
    if _taken:
        signal.signal(signal.SIGINT, signal.default_int_handler)
