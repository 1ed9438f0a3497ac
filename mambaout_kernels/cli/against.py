"""bench model --against: which models that names, what is compared, and its tables."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..benchmarking import against, report_against
from ..benchmarking.against import Against
from ..benchmarking.measure import Row
from ..benchmarking.workloads import Cell
from ..models import VARIANTS
from .terminal import UsageError, comma_list, installed, show_table

TABLE = ("paper", "all")  # names of the whole of comparators.models.MODELS
MODES = ("fwd", "train")


def add_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument("--against", type=comma_list(str), default=[], metavar="NAMES",
                         help="other models beside the variants, on the same images, in modes "
                         f"{' and '.join(MODES)}: of timm or of the papers' table (docs/benchmarking.md); "
                         f"{TABLE[0]}: all of that table")  # fmt: skip


def names(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """MambaOut's variants and the other models among the names given, each once.

    UsageError for one that is unknown, or that is timm's where timm is not installed.
    """
    from ..comparators.models import MODELS

    found = [
        name for each in given for name in ((n for n in MODELS if n not in _left_out()) if each in TABLE else [each])
    ]
    timms: list[str] | None = None
    for name in found:
        if name in VARIANTS or (name in MODELS and MODELS[name].factory is not None):
            continue
        if not installed("timm") and name in MODELS:
            raise UsageError(f"--against {name} needs timm: pip install timm, or mambaout-kernels[cli]")
        timms = _timms() if timms is None else timms
        if name not in timms:
            raise UsageError(_unknown(name, [*VARIANTS, *MODELS], timms))
    unique = list(dict.fromkeys(found))
    return [name for name in unique if name in VARIANTS], [name for name in unique if name not in VARIANTS]


def _timms() -> list[str]:
    if not installed("timm"):
        return []
    import timm

    return timm.list_models()


def _unknown(name: str, table: Sequence[str], timms: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys([*table, *timms]), n=4)
    near = f"; close: {', '.join(close)}" if close else ""
    more = (
        "timm's: python -c 'import timm; print(*timm.list_models())'"
        if timms
        else "for timm's: pip install timm, or mambaout-kernels[cli]"
    )
    listed = ", ".join(dict.fromkeys((TABLE[0], *table)))
    return f"--against: {name!r} is no model that is known here{near}. Allowed: {listed}; {more}"


def _left_out() -> list[str]:
    """What of the papers' table cannot be made here."""
    from ..comparators.models import MODELS

    return [] if installed("timm") else [name for name, model in MODELS.items() if model.factory is None]


def comparisons(cells: Iterable[Cell], others: Sequence[str]) -> list[Against]:
    """Of cells of whole models: one for each mode, dtype, batch and size of images. UsageError where no mode is one."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        if cell.mode in MODES:
            key = (cell.mode, cell.dtype, cell.batch, cell.shape.image_size)
            groups.setdefault(key, []).append(replace(cell, contenders=("fused", "eager")))
    if not groups:
        raise UsageError(f"--against: models are compared in modes {' and '.join(MODES)}; --mode has none of them")
    return [Against(tuple(group), tuple(others)) for group in groups.values()]


def show(given: Sequence[str], rows: Sequence[Row]) -> None:
    compared = report_against.comparisons(rows)
    for name, members in compared.items():
        show_table(f"MambaOut and other models, {name}", *report_against.table(members))
    if not compared:
        return
    print(report_against.NOTES.format(checked=against.CHECKED_SIZE))
    if sources := report_against.sources(rows):
        print("top-1: percent, after training on ImageNet-1K at 224 x 224, as reported by", *sources, sep="\n  ")
    if left_out := set(given) & {*TABLE} and _left_out():
        print(f"left out, timm is not installed: {', '.join(left_out)}: pip install timm, or mambaout-kernels[cli]")
    failures = {(row["label"], row["failure"]) for row in rows if row["subject"] == "against" and "failure" in row}
    for name, failure in sorted(failures):
        print(f"{name}: {failure}")
