"""Time and memory of token mixers over the number of tokens, both logarithmic, a column for each width."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis import length_ratio
from .mixers import MIXERS
from .sweep import Row

# Of a family one colour: gated convolution, attention, scans, other convolutions.
STYLES = {
    "gated-conv": ("#17406b", "-"), "gated-conv-full": ("#7aa6d6", "-"),
    "attention": ("#b3282d", "-"), "attention-causal": ("#e08a8d", "-"),
    "cross-scan": ("#1e6b3a", "-"), "cross-scan-mamba-ssm": ("#1e6b3a", ":"),
    "local-scan": ("#3f9b5f", "--"), "atrous-scan": ("#7cc495", "-"),
    "bidirectional-scan": ("#8a9a2b", "-"), "continuous-scan": ("#c2cc6b", "--"),
    "separable-conv": ("#7d5ba6", "-"), "inception": ("#b9a0d3", "-"), "depthwise": ("#8c8c8c", "-"),
    "pooling": ("#c4c4c4", "-"),
}  # fmt: skip


def draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    """Write a PNG; False, and no file, when nothing was timed. Needs matplotlib."""
    timed = [row for row in rows if row.median_s]
    if not timed:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dims = list(dict.fromkeys(row.dim for row in timed))
    figure, axes = pyplot.subplots(
        2, len(dims), squeeze=False, sharex=True, sharey="row", layout="constrained",
        figsize=(1.2 + 4.0 * len(dims), 8.2),
    )  # fmt: skip
    for column, dim in zip(axes.T, dims, strict=True):
        of_dim = [row for row in timed if row.dim == dim]
        for ax, value in zip(column, ("median_s", "peak_bytes"), strict=True):
            _lines(ax, of_dim, value, dim)
        column[0].set_title(f"D = {dim}", fontsize=10)
        column[1].set_xlabel("tokens L of an image")
    axes[0, 0].set_ylabel("milliseconds, median")
    axes[1, 0].set_ylabel("MB made and alive at once")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 1 + len(dims)), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def _lines(ax: Any, rows: Sequence[Row], value: str, dim: int) -> None:
    scale = 1e3 if value == "median_s" else 1e-6
    for name in dict.fromkeys(row.mixer for row in rows):
        points = [
            (row.tokens, getattr(row, value) * scale) for row in rows if row.mixer == name and getattr(row, value)
        ]
        colour, line = STYLES[name]
        ours = name == "gated-conv"
        ax.plot(*zip(*points, strict=True), line, color=colour, marker="o", markersize=3, label=MIXERS[name].label,
                linewidth=2.4 if ours else 1.3, zorder=3 if ours else 2)  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    long = 6 * dim
    assert length_ratio(long, dim) == 1
    ax.axvline(long, color="#444444", linewidth=0.9, linestyle=":")
    ax.annotate("L = 6D", (long, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points",
                fontsize=8, color="#444444")  # fmt: skip
    lengths = sorted({row.tokens for row in rows})
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=7.5, rotation=35)
    ax.minorticks_off()
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
