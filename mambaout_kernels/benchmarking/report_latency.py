"""Tables of latency under load and of cold starts."""

from collections.abc import Sequence

from . import cold_start
from .latency import PERCENTS
from .measure import Row
from .report import Table, check_text, precision
from .workloads import CONTENDERS, NOT_AVAILABLE


def _figures(row: Row, figures: Sequence[tuple[str, float, str]]) -> list[str]:
    """Of (key, factor, format); where there are none, the first says why."""
    if "failure" in row:
        word = NOT_AVAILABLE if row["failure"].startswith(NOT_AVAILABLE) else "failed"
        return [word] + [""] * (len(figures) - 1)
    return ["" if row.get(key) is None else _number(row[key] * factor, digits) for key, factor, digits in figures]


def _number(value: float, digits: str) -> str:
    return f"{value:.0f}" if digits == ".3g" and value >= 1000 else f"{value:{digits}}"


def latency_table(rows: Sequence[Row]) -> Table:
    """A line per cell, number of clients and contender: milliseconds of a request by percentile, images per second."""
    headings = ["model", "batch", "dtype", "clients", "workers x thr", "contender"]
    headings += [f"p{percent}, ms" for percent in PERCENTS] + ["images/s", "requests", "check"]
    figures = [*((f"p{percent}_s", 1e3, ".3g") for percent in PERCENTS), ("per_second", 1.0, ".1f")]
    figures.append(("requests", 1, "d"))
    lines = []
    for row in rows:
        if row["subject"] == "latency":
            line = [row["label"], str(row["batch"]), precision(row), str(row["clients"])]
            line += [f"{row['workers']} x {row['threads']}", CONTENDERS[row["contender"]]]
            lines.append([*line, *_figures(row, figures), check_text(row)])
    return headings, lines


def cold_start_table(rows: Sequence[Row]) -> Table:
    """A line per model and contender: seconds until it can be called, of the first call and later ones; its memory."""
    headings = ["model", "dtype", "thr", "contender", "ready, s", "import, s", "load, s", "first call, ms"]
    headings += ["warm call, ms", "resident, MiB", "at most, MiB", "check"]
    figures = [(key, 1.0, ".3g") for key in ("ready_s", "import_s", "load_s")]
    figures += [(key, 1e3, ".3g") for key in ("first_s", "warm_s")]
    figures += [(key, 2**-20, ".0f") for key in ("steady_bytes", "peak_bytes")]
    lines = []
    for row in rows:
        if row["subject"] == "cold start":
            line = [row["label"], precision(row), str(row["threads"]), cold_start.LABELS[row["contender"]]]
            lines.append([*line, *_figures(row, figures), check_text(row)])
    return headings, lines


def slower_loads(rows: Sequence[Row]) -> list[str]:
    """A line for each load and contender with a shorter p50 or p99, or a higher throughput, than fused."""
    found = []
    keys = ("label", "batch", "dtype", "clients", "workers", "threads")
    timed = [row for row in rows if row["subject"] == "latency" and "per_second" in row]
    fused = {tuple(row[key] for key in keys): row for row in timed if row["contender"] == "fused"}
    for row in timed:
        own = fused.get(tuple(row[key] for key in keys), row)
        ratios = {key: row[key] / own[key] for key in ("p50_s", "p99_s")}
        ratios["per_second"] = own["per_second"] / row["per_second"]
        behind = [f"{ratio:.2f}x by {key.removesuffix('_s')}" for key, ratio in ratios.items() if ratio < 1]
        if behind:
            load = f"{row['label']}, batch {row['batch']}, {precision(row)}, clients: {row['clients']}"
            found.append(f"{CONTENDERS[row['contender']]}: {', '.join(behind)}: {load}")
    return found
