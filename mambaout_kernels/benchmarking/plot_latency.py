"""Throughput against latency: a panel per model, dtype and batch, a line per contender, a point per load."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import Row
from .plot import COLOURS, ORDER
from .report import precision
from .workloads import CONTENDERS

COLUMNS = 2


def draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Write a PNG; False, and no file, when no row of "latency" has figures. Needs matplotlib."""
    rows = [row for row in rows if row["subject"] == "latency" and "per_second" in row]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["label"], precision(row), row["batch"]), []).append(row)
    names = [name for name in ORDER if any(row["contender"] == name for row in rows)]
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, squeeze=False, layout="constrained", figsize=(1.0 + 4.6 * columns, 1.2 + 3.4 * lines)
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, ((label, dtype, batch), members) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            _line(ax, [row for row in members if row["contender"] == name], name)
        ax.set_title(f"{label}, {dtype}, batch {batch}", fontsize=10)
        ax.set_xlabel("99 of 100 requests within, ms", fontsize=9)
        ax.set_ylabel("images per second", fontsize=9)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.set_ylim(bottom=0)
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Line2D([], [], color=COLOURS[name], marker="o", label=CONTENDERS[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"throughput and latency; at each point the number of clients\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _line(ax: Any, rows: Sequence[Row], name: str) -> None:
    rows = sorted(rows, key=lambda row: row["clients"])
    latency, throughput = [row["p99_s"] * 1e3 for row in rows], [row["per_second"] for row in rows]
    ax.plot(latency, throughput, color=COLOURS[name], marker="o", markersize=4, linewidth=1.2)
    for row, x, y in zip(rows, latency, throughput, strict=True):
        ax.annotate(str(row["clients"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
