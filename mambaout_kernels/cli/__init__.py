"""The command line: mambaout-kernels info | check | bench | classify | analyze | audit | tune."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import analyze, audit, bench, check, classify, info, tune
from .terminal import UsageError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mambaout-kernels",
        description="Fused kernels for MambaOut's Gated CNN block: what runs here, is it right, how fast.",
    )
    top.add_argument("--version", action="version", version=f"mambaout-kernels {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, check, bench, classify, analyze, audit, tune):
        command.add_to(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a result is wrong, 2 when the command cannot be done as given, 130 when interrupted."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
