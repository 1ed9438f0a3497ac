"""Tables of MambaOut beside other models: one for each comparison, a line for each model and how it runs."""

from collections.abc import Sequence
from typing import Any

from .against import HOW
from .measure import Row
from .report import Table, check_text, precision
from .workloads import NOT_AVAILABLE

HEADINGS = ["model", "runs", "parameters, M", "MACs, G", "images/s", "ms per batch", "as fast as fused", "of peak",
            "top-1 (paper)", "check"]  # fmt: skip
NOTES = (
    "Random weights; nothing here is trained. As made: in eager PyTorch, as its authors or timm make it; where it\n"
    "scans, on this package's kernel, checked against fp64 at {checked} x {checked}.\n"
    "ms: minimum / median; as fast: by medians, as MambaOut's fused of the nearest number of parameters.\n"
    "MACs: of one image, computed; of a scan as papers count it: 9 of each state and 1 of the skip connection, of\n"
    "each token and channel. Of peak: two operations of each of these MACs, over the FMA peak."
)


def comparisons(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each comparison, by what it was, in words."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["subject"] == "against":
            size, threads = row["image_size"], row["threads"]
            name = f"{row['mode']} {precision(row)}, batch {row['batch']}, {size} x {size} pixels, "
            found.setdefault(f"{name}{threads} thread{'s' if threads > 1 else ''}", []).append(row)
    return found


def table(rows: Sequence[Row]) -> Table:
    """Of one comparison: by size class, MambaOut first."""
    variants = {row["label"]: row["parameters"] for row in rows if row["contender"] != "as made"}
    ordered = sorted(rows, key=lambda row: (variants.get(row.get("nearest", ""), 0), row["contender"] == "as made"))
    return list(HEADINGS), [_line(row) for row in ordered]


def _line(row: Row) -> list[str]:
    line = [
        row["label"],
        HOW[row["contender"]],
        _scaled(row, "parameters", 1e6, ".1f"),
        _scaled(row, "macs", 1e9, ".2f"),
    ]
    if "failure" in row:
        line += [NOT_AVAILABLE if row["failure"].startswith(NOT_AVAILABLE) else "failed", "", "", ""]
    elif "median_s" not in row:
        line += [""] * 4
    else:
        times = row["times_fused"]
        line += [_rounded(row["per_second"]), f"{_rounded(row['min_s'] * 1e3)} / {_rounded(row['median_s'] * 1e3)}"]
        line.append("" if times is None else f"{times:.2f}x {row['nearest']}")
        line.append("" if row.get("peak_share") is None else f"{row['peak_share']:.0%}")
    return [*line, _scaled(row, "top1", 1, ".1f"), check_text(row)]


def _scaled(row: Row, key: str, unit: float, digits: str) -> str:
    value: Any = row.get(key)
    return "" if value is None else f"{value / unit:{digits}}"


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def sources(rows: Sequence[Row]) -> list[str]:
    """A line for each paper whose top-1 is told: the paper, and the models."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["subject"] == "against" and row.get("top1") is not None:
            found.setdefault(row["top1_source"], {})[row["label"]] = None
    return [f"{source}: {', '.join(names)}" for source, names in found.items()]
