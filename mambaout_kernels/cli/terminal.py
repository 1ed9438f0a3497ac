"""What the commands print: tables and progress, by rich where it is installed and shown to a person."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

_Item = TypeVar("_Item")


class UsageError(Exception):
    """The command cannot be done as given; the text says why and what would do."""


class WrongResult(Exception):
    """The command was done, and what it computed is no result; the text says why."""


def printable(text: str) -> str:
    """Control characters, and bytes of file names that are not text, as escapes; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def check_writable(argument: str, path: Path) -> None:
    """UsageError, before a run, when its results cannot be written to `path`; makes the folders on the way."""
    with writing(argument, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = os.path.lexists(path)
        path.open("ab").close()
        if not existed:
            path.unlink()


@contextmanager
def writing(argument: str, path: Path) -> Iterator[None]:
    """UsageError instead of an OSError while `path` is written."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{argument} {path} cannot be written: {error.strerror or error}") from None


def installed(module: str) -> bool:
    return find_spec(module) is not None


def require(module: str, package: str, extra: str, purpose: str) -> None:
    """UsageError, naming what to install, when an optional dependency is missing."""
    if not installed(module):
        raise UsageError(f"{purpose} needs {package}: pip install {package}, or mambaout-kernels[{extra}]")


def comma_list(item: Callable[[str], _Item]) -> Callable[[str], list[_Item]]:
    """An argparse type: "1,2" as [item("1"), item("2")]."""

    def parse(text: str) -> list[_Item]:
        return [item(part.strip()) for part in text.split(",")]

    return parse


def one_of(allowed: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of some words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def positive(text: str) -> int:
    """An argparse type: an integer from 1 to 2^31 - 1."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer below 2^31")
    return int(text)


def positive_seconds(text: str) -> float:
    """An argparse type: a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _rich() -> bool:
    return installed("rich")


def show_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on stdout; nothing without lines."""
    if not lines:
        return
    title, lines = printable(title), [[printable(text) for text in line] for line in lines]
    if not _rich():
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        print(f"\n{title}")
        for line in (headings, *lines):
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Output(Console):
        def on_broken_pipe(self) -> None:  # instead of ending the process
            raise

    # Text: what comes in brackets is no markup.
    table = Table(title=Text(title, style="bold"), title_justify="left")
    least = [_least_width(column) for column in zip(*lines, strict=True)]
    for heading, width in zip(headings, least, strict=True):
        table.add_column(Text(heading), min_width=width)
    for line in lines:
        style = "red" if any(text.startswith(("WRONG", "FAILED")) for text in line) else None
        table.add_row(*map(Text, line), style=style)
    # Into a file or a pipe, every line whole; on a narrow terminal, every number.
    console = Output(width=None if sys.stdout.isatty() else 240, highlight=False)
    console.width = max(console.width, sum(least) + 3 * len(least) + 1)
    console.print()
    console.print(table)


def _least_width(column: Sequence[str]) -> int:
    """Of a column's cells: numbers stay whole, sentences may take several lines."""
    return max(len(text) if len(text) <= 24 else max(map(len, text.split())) for text in column)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], Any]]:
    """Yields a function to call with the name of each of `total` steps before it starts; of several, on stderr."""
    if total < 2:
        yield lambda step: None
        return
    if not (_rich() and sys.stderr.isatty()):
        started = 0

        def announce(step: str) -> None:
            nonlocal started
            started += 1
            print(f"[{started}/{total}] {printable(step)}", file=sys.stderr, flush=True)

        yield announce
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        started = 0

        def advance(step: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=printable(step))
            started += 1

        yield advance
