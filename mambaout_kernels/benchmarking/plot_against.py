"""Accuracy, as papers report it, over measured throughput: a panel per comparison, a point per model."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import Row
from .plot import COLOURS
from .report_against import comparisons

COLUMNS = 2
LEAST = 2  # points, of a panel
AREA = 5.0  # square points of a marker, for a million parameters
OTHERS = {"scans, on this package's kernel": "#c9622b", "timm": "#5f9e6e"}
LEFT, RIGHT, BELOW, ABOVE = (-1, 0), (1, 0), (0, -1), (0, 1)  # of a point, where its name is


def draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Write a PNG; False, and no file, where no comparison has two models of a known top-1. Needs matplotlib."""
    panels = {name: _points(members) for name, members in comparisons(rows).items()}
    panels = {name: members for name, members in panels.items() if len({row["label"] for row in members}) >= LEAST}
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, squeeze=False, layout="constrained", figsize=(1.0 + 6.4 * columns, 1.4 + 4.6 * lines)
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (name, members) in zip(axes.flat, panels.items(), strict=False):
        _panel(ax, members)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("images per second, measured with random weights", fontsize=9)
        ax.set_ylabel("top-1, percent, as papers report it", fontsize=9)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_formatter(ticker.NullFormatter())
        ax.tick_params(which="both", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.25, y=0.12)
    names = {"MambaOut, fused": COLOURS["fused"], "MambaOut, eager": COLOURS["eager"], **OTHERS}
    handles = [pyplot.Line2D([], [], color=c, marker="o", linestyle="", label=name) for name, c in names.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(f"area of a point: its parameters\n{title}", fontsize=10)
    figure.canvas.draw()  # names are placed in a layout that is final
    for ax, members in zip(axes.flat, panels.values(), strict=False):
        _write_names(ax, members)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _points(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("top1") and "median_s" in row and row.get("check", True)]


def _panel(ax: Any, rows: Sequence[Row]) -> None:
    for how in ("eager", "fused"):
        own = sorted((row for row in rows if row["contender"] == how), key=lambda row: row["parameters"])
        ax.plot(*_positions(own), color=COLOURS[how], linewidth=1.2)
        _scatter(ax, own, COLOURS[how])
    for colour, scans in zip(OTHERS.values(), (True, False), strict=True):
        _scatter(ax, [r for r in rows if r["contender"] == "as made" and ("scan" in r["backend"]) == scans], colour)


def _positions(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["per_second"] for row in rows], [row["top1"] for row in rows]


def _radius(row: Row) -> float:
    return (AREA * row["parameters"] / 1e6 / math.pi) ** 0.5


def _scatter(ax: Any, rows: Sequence[Row], colour: str) -> None:
    ax.scatter(*_positions(rows), s=[4 * _radius(row) ** 2 for row in rows], color=colour, alpha=0.75, linewidths=0)


def _write_names(ax: Any, rows: Sequence[Row]) -> None:
    """Beside every point but eager's, where it covers least of the others and of their names."""
    from matplotlib.transforms import Bbox

    pixels = ax.figure.dpi / 72
    taken = []
    for row in rows:
        (x, y), radius = ax.transData.transform((row["per_second"], row["top1"])), pixels * _radius(row)
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    for row in (row for row in rows if row["contender"] != "eager"):
        point = row["per_second"], row["top1"]
        text = ax.annotate(row["label"], point, (0, 0), textcoords="offset points", fontsize=7, in_layout=False)
        boxes = {}
        # Of models as accurate scans are the slower.
        sides = (LEFT, RIGHT) if "scan" in row["backend"] else (RIGHT, LEFT)
        for place in (*sides, BELOW, ABOVE):
            _move(text, place, _radius(row) + 2)
            boxes[place] = text.get_window_extent()
        covered = {
            place: sum(map(box.overlaps, taken)) + (box.x0 < ax.bbox.x0 or box.x1 > ax.bbox.x1)
            for place, box in boxes.items()
        }
        best = min(covered, key=lambda place: covered[place])
        _move(text, best, _radius(row) + 2)
        taken += [boxes[best]] * 2  # a name over a name is worse than over a point


def _move(text: Any, place: tuple[int, int], gap: float) -> None:
    x, y = place
    text.xyann = gap * x, gap * y
    text.set_ha(("right", "center", "left")[x + 1])
    text.set_va(("top", "center", "bottom")[y + 1])
