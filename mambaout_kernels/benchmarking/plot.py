"""Bars of how many times as fast as eager each contender is: a panel per subject, mode, dtype and number of threads."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import Row
from .report import precision
from .workloads import CONTENDERS

COLOURS = {"naive": "#b8b8b8", "eager": "#7f7f7f", "compile": "#e39b3b", "fused": "#2c6fbb", "modules": "#8fb4dc"}
COLOURS |= {"onnxruntime": "#5f9e6e", "openvino": "#8d6bb0"}
COLOURS |= {"cudnn-benchmark": "#a08060", "max-autotune": "#c9622b", "compile-fused": "#17406b"}
COLOURS |= {"timm": "#c9b037", "timm-channels-last": "#8c7a1f", "timm-compile": "#d98ea3"}
COLOURS |= {"triton": "#58b5c9", "cuda": "#3a8fd6"}
COLOURS |= {"fused-graphs": "#0f5fa8", "timm-reduce-overhead": "#b5657d"}
ORDER = ("naive", "eager", "cudnn-benchmark", "timm", "timm-channels-last", "compile", "max-autotune", "timm-compile",
         "timm-reduce-overhead", "onnxruntime", "openvino", "triton", "cuda", "modules", "fused", "fused-graphs",
         "compile-fused")  # fmt: skip
WIDEST = 16.0  # inches
PER_BAR = 0.27  # inches, of a label above it


def draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Write a PNG; False, and no file, when no row has a speed-up. Needs matplotlib."""
    rows = [row for row in rows if row.get("speedup") is not None]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    panels: dict[tuple[str, str], dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        of_kind = panels.setdefault((row["subject"], row["mode"]), {})
        of_kind.setdefault((precision(row), row["threads"]), []).append(row)
    names = [name for name in ORDER if any(row["contender"] == name for row in rows)]
    groups = [{(r["label"], r["batch"]) for r in members} for found in panels.values() for members in found.values()]
    widest = max(map(len, groups))
    panel = max(3.4, widest * (PER_BAR * len(names) + 0.15))
    most = max(map(len, panels.values()))
    columns = math.ceil(most / math.ceil(most / max(1, int(WIDEST / panel))))
    lines = [list(found.items())[i : i + columns] for found in panels.values() for i in range(0, len(found), columns)]
    kinds = [kind for kind, found in panels.items() for _ in range(0, len(found), columns)]
    width = 0.8 + panel * columns
    figure, axes = pyplot.subplots(
        len(lines), columns, squeeze=False, layout="constrained", figsize=(width, 1.2 + 2.4 * len(lines))
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for line, (subject, mode), of_line in zip(axes, kinds, lines, strict=True):
        for ax, ((dtype, threads), members) in zip(line, of_line, strict=False):
            _bars(ax, members, names)
            ax.set_ylim(0, 1.15 * max(row["speedup"] for row in members))
            ax.set_title(f"{subject} {mode}, {dtype}, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    handles = [Patch(color=COLOURS[name], label=CONTENDERS[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), int(width / 1.9)), frameon=False)
    what = "times as fast as eager partial; each panel has a scale of its own"
    figure.suptitle("\n".join(textwrap.fill(text, int(11 * width)) for text in (what, title)), fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _bars(ax: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    groups = list(dict.fromkeys((row["label"], row["batch"]) for row in rows))
    width = 0.84 / len(names)
    ax.set_axis_on()
    for index, name in enumerate(names):
        by_group = {(row["label"], row["batch"]): row["speedup"] for row in rows if row["contender"] == name}
        found = [at for at, group in enumerate(groups) if group in by_group]
        positions = [at + (index - (len(names) - 1) / 2) * width for at in found]
        heights = [by_group[groups[at]] for at in found]
        bars = ax.bar(positions, heights, 0.94 * width, color=COLOURS[name])
        if name not in ("naive", "eager"):
            ax.bar_label(bars, fmt="%.2f" if max(heights, default=0) < 3 else "%.1f", fontsize=7, padding=1)
    ax.axhline(1, color="#444444", linewidth=0.7, zorder=0.5)
    ax.set_xticks(range(len(groups)), [f"{label}\nbatch {batch}" for label, batch in groups], fontsize=7.5)
    middle, half = (len(groups) - 1) / 2, max(len(groups), 2) / 2 + 0.1
    ax.set_xlim(middle - half, middle + half)
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
