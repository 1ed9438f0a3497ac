"""What the commands print: tables and progress, by rich where it is installed and shown to a person."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypeVar

_Item = TypeVar("_Item")


class UsageError(Exception):
    """The command cannot be done as given; the text says why and what would do."""


def require(module: str, package: str, extra: str, purpose: str) -> None:
    """UsageError, naming what to install, when an optional dependency is missing."""
    if find_spec(module) is None:
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
    """An argparse type: an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
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
    return find_spec("rich") is not None


def show_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on stdout; nothing without lines."""
    if not lines:
        return
    if not _rich():
        widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
        print(f"\n{title}")
        for line in (headings, *lines):
            print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in headings:
        table.add_column(heading)
    for line in lines:
        style = "red" if any(text.startswith(("WRONG", "FAILED")) for text in line) else None
        table.add_row(*map(Text, line), style=style)
    # Into a file or a pipe, every line whole.
    console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)
    console.print()
    console.print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], Any]]:
    """Yields a function to call with the name of each of `total` steps before it starts; shown on stderr."""
    if not (_rich() and sys.stderr.isatty()):
        started = 0

        def announce(step: str) -> None:
            nonlocal started
            started += 1
            print(f"[{started}/{total}] {step}", file=sys.stderr, flush=True)

        yield announce
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=total)
        started = 0

        def advance(step: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=step)
            started += 1

        yield advance
