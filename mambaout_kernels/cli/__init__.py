"""The command line: mambaout-kernels info | check | bench | classify | analyze | mixers | audit | tune."""

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from .. import __version__, backends, interrupt
from .terminal import UsageError, WrongResult, printable

_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory", re.IGNORECASE)  # torch's words


def parser() -> argparse.ArgumentParser:
    from . import analyze, audit, bench, check, classify, info, mixers, tune  # here, where main handles an interrupt

    top = argparse.ArgumentParser(
        prog="mambaout-kernels",
        description="Fused kernels for MambaOut's Gated CNN block: what runs here, is it right, how fast.",
    )
    top.add_argument("--version", action="version", version=f"mambaout-kernels {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, check, bench, classify, analyze, mixers, audit, tune):
        command.add_to(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 when a result is wrong; 2 when the command cannot be done as given, or out of memory; 130 when
    interrupted; 141, without a word, when the reader of the output has closed it, as `head` does.
    """
    interrupt.is_an_exception()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stdout is None:
        return _end("error: standard output is closed", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):  # of an encoding that may not have every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            args = parser().parse_args(argv)
            _check_forced(args)
            status: int = args.run(args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except BrokenPipeError:
        _discard(sys.stdout)
        _discard(sys.stderr)
        return 141
    except UsageError as error:
        return _end(f"error: {error}", 2)
    except WrongResult as error:
        return _end(f"error: {error}", 1)
    except OSError as error:
        _discard(sys.stdout)
        return _end(f"error: {error.filename or 'standard output'}: {error.strerror or error}", 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        return _end(f"error: out of memory: {str(error).partition(chr(10))[0]}".rstrip(": "), 2)
    return status


def _check_forced(args: argparse.Namespace) -> None:
    """UsageError where the environment asks for a backend that cannot be used; info tells of it."""
    from . import info

    name = backends.forced()
    reason = None if name is None or args.run is info.run else backends.status()[name]
    if reason is not None:
        raise UsageError(f"{backends.ENVIRONMENT_VARIABLE}={name} cannot be used here: {reason}")


def _end(text: str, status: int) -> int:
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)
    return status


def _discard(stream: TextIO) -> None:
    """What could not be written is not tried again when Python ends."""
    with suppress(OSError):  # a stream without a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
