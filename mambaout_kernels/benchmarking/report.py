"""What a run found: summary, tables, and the files it leaves behind."""

import csv
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import machine
from .measure import Row
from .run import Outcome
from .workloads import CONTENDERS, NOT_AVAILABLE, OWN, SUBJECTS

SCHEMA = 1
SPREAD_LIMIT = 1.5
BEST = "best"  # of all that compute the same: every one but ours and naive
WIDE = 4  # contenders, beyond which a table has no column of fused's speed-up over each
Table = tuple[list[str], list[list[str]]]  # headings, rows


def geomean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def red(rows: Iterable[Row]) -> list[Row]:
    """The rows in which fused is not what it should be."""
    return [row for row in rows if row.get("check") is False]


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return groups


def timed_cells(rows: Iterable[Row]) -> list[Row]:
    """The rows of whole cells that were timed."""
    return [row for row in rows if row["subject"] in SUBJECTS and row.get("mode") != "memory"]


def best_other(by_name: dict[str, Row]) -> Row | None:
    """Least median and least minimum of the contenders of a cell that compute what fused does; None for fewer than 2.

    Not ours, nor "naive", which computes more, nor what failed.
    """
    others = [row for name, row in by_name.items() if name not in (*OWN, "naive") and "median_s" in row]
    if len(others) < 2:
        return None
    return {key: min(row[key] for row in others) for key in ("median_s", "min_s")}


def precision(row: Row) -> str:
    return f"{row['dtype']} autocast" if row.get("autocast") else str(row["dtype"])


def spread(rows: Iterable[Row]) -> list[str]:
    """A warning when many timings have a median far above their minimum: something else was running at times."""
    timed = [row for row in rows if "median_s" in row and row["contender"] != "difference"]
    wide = [row for row in timed if row["median_s"] > SPREAD_LIMIT * row["min_s"]]
    if len(wide) * 10 <= len(timed):
        return []
    return [
        f"in {len(wide)} of {len(timed)} timings the median is over {SPREAD_LIMIT} times the minimum: prefer minima"
    ]


_GROUP = ("subject", "mode", "dtype", "autocast", "threads")
_CELL = (*_GROUP, "label", "batch")


def summary(rows: Sequence[Row]) -> list[Row]:
    """How many times fused is faster, by subject, mode, dtype, threads and whom it is compared with ("over").

    Over BEST: of each cell, the best other. Geometric mean over the group's cells, and the worst cell. No figures where
    fused is wrong in any of them.
    """
    timed = timed_cells(rows)
    cells = [{row["contender"]: row for row in members} for members in _groups(timed, *_CELL).values()]
    for cell in cells:
        if (best := best_other(cell)) is not None:
            cell[BEST] = best
    found = []
    for other in (*CONTENDERS, BEST):
        pairs = [(cell["fused"], cell[other]) for cell in cells if other != "fused" and {"fused", other} <= cell.keys()]
        for group, members in _groups(({**dict(fused), "_other": row} for fused, row in pairs), *_GROUP).items():
            compared = [row for row in members if "failure" not in row["_other"]]
            if compared:
                found.append({**dict(zip(_GROUP, group, strict=True)), "over": other, **_compared(compared)})
    return sorted(found, key=lambda entry: list(_groups(timed, *_GROUP)).index(tuple(entry[key] for key in _GROUP)))


def _compared(rows: Sequence[Row]) -> Row:
    wrong = len(red(rows))
    if wrong:
        return {"cells": len(rows), "red": wrong}
    ratios = [row["_other"]["median_s"] / row["median_s"] for row in rows]
    worst = min(range(len(rows)), key=ratios.__getitem__)
    return {
        "cells": len(rows),
        "red": 0,
        "speedup_geomean": geomean(ratios),
        "speedup_min_geomean": geomean(row["_other"]["min_s"] / row["min_s"] for row in rows),
        "speedup_worst": ratios[worst],
        "worst_cell": f"{rows[worst]['label']}, batch {rows[worst]['batch']}",
    }


def slower_cells(rows: Sequence[Row]) -> list[str]:
    """A line for each cell and contender that fused is slower than, by medians; the worst first."""
    found = []
    for members in _groups(timed_cells(rows), *_CELL).values():
        by_name = {row["contender"]: row for row in members if "median_s" in row}
        fused = by_name.get("fused")
        if fused is None or not fused.get("check", True):
            continue
        cell = f"{fused['subject']} {fused['mode']}, {fused['label']}, batch {fused['batch']}, {precision(fused)}"
        for name, other in by_name.items():
            if other["median_s"] < fused["median_s"]:
                times = other["median_s"] / fused["median_s"]
                line = f"{times:.2f}x of {CONTENDERS[name]}: {cell}, threads: {fused['threads']}"
                found.append((times, line))
    return [line for _, line in sorted(found)]


def memory_summary(rows: Sequence[Row]) -> list[Row]:
    """Bytes kept for backward and at the peak as a multiple of eager's: geometric mean and worst over all cells."""
    found = []
    keys = (*_GROUP, "of", "contender")
    for group, members in _groups((row for row in rows if row.get("mode") == "memory"), *keys).items():
        if group[-1] == "eager":
            continue
        entry = {**dict(zip(keys, group, strict=True)), "cells": len(members)}
        for key in ("kept_ratio", "peak_ratio"):
            ratios = [row[key] for row in members if row.get(key) is not None]
            if ratios:
                entry |= {f"{key}_geomean": geomean(ratios), f"{key}_worst": max(ratios)}
        found.append(entry)
    return found


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def document(name: str, outcome: Outcome, settings: dict[str, Any], warnings: Sequence[str]) -> dict[str, Any]:
    """Everything about a run, as JSON can hold it."""
    return finite(
        {
            "schema": SCHEMA,
            "name": name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine.description(),
            "settings": settings,
            "fma_peak_by_threads": {str(threads): peak for threads, peak in outcome.fma_peak.items()},
            "pinned_core_by_threads": {str(threads): core for threads, core in outcome.pinned.items()},
            "warnings": list(warnings),
            "summary": summary(outcome.rows),
            "memory_summary": memory_summary(outcome.rows),
            "results": outcome.rows,
        }
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    if "failure" in row:
        return NOT_AVAILABLE if row["failure"].startswith(NOT_AVAILABLE) else "failed"
    return f"{row['min_s'] * 1e3:.3g} / {row['median_s'] * 1e3:.3g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def cells_table(rows: Sequence[Row]) -> Table:
    """A line per cell: each contender's minimum and median, fused's speed-up over each other one, its check.

    Of many contenders, its speed-up over the best of them alone: the summary has the others.
    """
    timed = timed_cells(rows)
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in timed)]
    others = [name for name in names if name != "fused"] if "fused" in names else []
    if len(names) > WIDE:
        others = [BEST]
    headings = ["what", "shape", "batch", "dtype", "thr"]
    headings += [f"{CONTENDERS[name]}, ms" for name in names] + [f"vs {name}" for name in others] + ["check"]
    lines = []
    keys = ("subject", "mode", "label", "batch", "dtype", "autocast", "threads")
    for members in _groups(timed, *keys).values():
        first, by_name = members[0], {row["contender"]: row for row in members}
        fused = by_name.get("fused", {})
        line = [f"{first['subject']} {first['mode']}", first["label"], str(first["batch"]), precision(first)]
        line += [str(first["threads"]), *(_milliseconds(by_name.get(name)) for name in names)]
        if (best := best_other(by_name)) is not None:
            by_name[BEST] = best
        for name in others:
            valid = fused.get("check", True) and "median_s" in fused and "median_s" in by_name.get(name, {})
            line.append(_times(by_name[name]["median_s"] / fused["median_s"]) if valid else "")
        lines.append([*line, check_text(fused)])
    return headings, lines


def check_text(row: Row) -> str:
    if "check" not in row:
        return ""
    if not row["check"]:
        return (
            f"WRONG: {row['check_name']}, error {row['check_error']:.1e}, {row['check_excess']:.2g} times the allowed"
        )
    return f"ok, apart by {row['check_difference']:.1e}"


def summary_table(entries: Sequence[Row]) -> Table:
    """A line per entry of `summary`."""
    headings = ["fused", "dtype", "thr", "over", "geomean", "of minima", "worst", "worst cell"]
    lines = []
    for entry in entries:
        line = [f"{entry['subject']} {entry['mode']}", precision(entry), str(entry["threads"])]
        line.append(CONTENDERS.get(entry["over"], "the best other"))
        if entry["red"]:
            lines.append([*line, "WRONG", "", "", f"{entry['red']} of {entry['cells']} cells"])
            continue
        line += [_times(entry[key]) for key in ("speedup_geomean", "speedup_min_geomean", "speedup_worst")]
        lines.append([*line, entry["worst_cell"]])
    return headings, lines


def memory_summary_table(entries: Sequence[Row]) -> Table:
    """A line per entry of `memory_summary`."""
    headings = ["what", "dtype", "contender", "kept, geomean", "worst", "peak, geomean", "worst"]
    lines = []
    for entry in entries:
        line = [f"{entry['subject']} {entry['of']}", precision(entry), CONTENDERS[entry["contender"]]]
        keys = ("kept_ratio_geomean", "kept_ratio_worst", "peak_ratio_geomean", "peak_ratio_worst")
        lines.append([*line, *(_times(entry.get(key)) for key in keys)])
    return headings, lines


def memory_table(rows: Sequence[Row]) -> Table:
    """A line per cell and contender: MiB kept (for backward; packed parameters) and at the peak; ratios to eager's."""
    headings = ["what", "shape", "batch", "dtype", "contender", "kept, MiB", "peak, MiB", "kept", "peak"]
    lines = []
    for row in rows:
        if row.get("mode") != "memory":
            continue
        sizes = [f"{row[key] / 2**20:.1f}" if row[key] is not None else "" for key in ("kept_bytes", "peak_bytes")]
        ratios = [_times(row[key]) for key in ("kept_ratio", "peak_ratio")]
        line = [f"{row['subject']} {row['of']}", row["label"], str(row["batch"]), precision(row)]
        lines.append([*line, CONTENDERS[row["contender"]], *sizes, *ratios])
    return headings, lines


def throughput_table(rows: Sequence[Row]) -> Table:
    """A line per model cell: images per second of each contender, and fused's check."""
    models = [row for row in timed_cells(rows) if row["subject"] == "model"]
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in models)]
    headings = ["model", "mode", "batch", "dtype", "thr", *(CONTENDERS[name] for name in names), "check"]
    lines = []
    for members in _groups(models, "label", "mode", "batch", "dtype", "autocast", "threads").values():
        first, by_name = members[0], {row["contender"]: row for row in members}
        line = [first["label"], first["mode"], str(first["batch"]), precision(first), str(first["threads"])]
        line += [
            f"{by_name[name]['per_second']:.1f}" if "per_second" in by_name.get(name, {}) else "" for name in names
        ]
        lines.append([*line, check_text(by_name.get("fused", {}))])
    return headings, lines


def overhead_table(rows: Sequence[Row]) -> Table:
    """Minimum and median of the public op, of the compiled one under it, and their difference."""
    found = [row for row in rows if row["subject"] == "overhead"]
    lines = [
        [row["contender"], str(row["threads"]), f"{row['min_s'] * 1e6:.2f}", f"{row['median_s'] * 1e6:.2f}"]
        for row in found
    ]
    return ["of", "thr", "minimum", "median"], lines
