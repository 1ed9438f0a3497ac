"""What a run found in words, and tables of arithmetic: parts of a model, and the share of the machine's FMA peak."""

from collections.abc import Sequence

from . import stages
from .measure import Row
from .report import Table, precision, summary


def peak_text(fma_peak: dict[int, dict[str, float]]) -> str:
    """The FMA peaks of a run in words; empty without any."""
    if not fma_peak:
        return ""
    by_threads = []
    for threads, peaks in sorted(fma_peak.items()):
        figures = ", ".join(f"{dtype} {flops / 1e9:.0f}" for dtype, flops in peaks.items())
        by_threads.append(f"{threads} thread{'s' if threads > 1 else ''}: {figures}")
    return f"FMA peak measured in this run, GFLOP/s: {'; '.join(by_threads)}"


_TOLD = {
    ("model", "fwd"): "the model in inference", ("model", "train"): "a training step of the model",
    ("block", "fwd"): "a block in inference", ("block", "train"): "a training step of a block",
    ("op", "fwd"): "the op forward", ("op", "bwd"): "the op backward",
}  # fmt: skip


def conclusions(rows: Sequence[Row]) -> list[str]:
    """A line for each subject and mode: how many times fused is as fast as eager and naive, on most threads."""
    found = summary(rows)
    most = max((row["threads"] for row in found), default=0)
    lines = []
    for (subject, mode), name in _TOLD.items():
        parts = []
        for over, than in (("eager", "PyTorch"), ("naive", "the naive full-channel block")):
            figures = [
                f"{row['speedup_geomean']:.2f} in {precision(row)}"
                for row in found
                if (row["subject"], row["mode"], row["over"], row["threads"]) == (subject, mode, over, most)
                and "speedup_geomean" in row
            ]
            if figures:
                parts.append(f"{' and '.join(figures)} times as fast as {than}")
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _share(row: Row) -> str:
    return "" if row.get("peak_share") is None else f"{row['peak_share']:.0%}"


def parts_table(rows: Sequence[Row]) -> Table:
    """A line per part of a model: GFLOP per image; ms per image (medians), GFLOP/s, share of the peak of each."""
    headings = ["model", "batch", "dtype", "thr", "part", "GFLOP"]
    for name in stages.CONTENDERS:
        headings += [f"{name}, ms", "GFLOP/s", "of peak"]
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["subject"] == "part":
            cells.setdefault((*_key(row), row["part"]), {})[row["contender"]] = row
    lines = []
    for key, by_name in cells.items():
        line = [*key, f"{next(iter(by_name.values())).get('flops', 0) / 1e9:.3f}"]
        for name in stages.CONTENDERS:
            row = by_name[name]
            rate = f"{row['flop_per_s'] / 1e9:.0f}" if "flop_per_s" in row else ""
            line += [f"{row['median_s'] / row['batch'] * 1e3:.3g}", rate, _share(row)]
        lines.append([*line, f"{by_name['fused']['speedup']:.2f}x"])
    return [*headings, "vs eager"], lines


def peak_table(rows: Sequence[Row]) -> Table:
    """A line per model cell: ms per image and share of the FMA peak of each contender whose arithmetic is known."""
    models = [row for row in rows if row["subject"] == "model" and row.get("peak_share") is not None]
    names = list(dict.fromkeys(row["contender"] for row in models))
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in models:
        gflop = f"{row['flops'] / 1e9:.2f}"
        cells.setdefault((*_key(row), gflop), {})[row["contender"]] = row
    lines = [[*key, *(_time_and_share(by_name.get(name)) for name in names)] for key, by_name in cells.items()]
    return ["model", "batch", "dtype", "thr", "GFLOP", *names], lines


def _key(row: Row) -> tuple[str, ...]:
    return row["label"], str(row["batch"]), precision(row), str(row["threads"])


def _time_and_share(row: Row | None) -> str:
    return "" if row is None else f"{row['median_s'] / row['batch'] * 1e3:.3g} ({_share(row)})"
