"""The report of gpu_acceptance.py, from the records that there are: REPORT.md and plots beside results.jsonl.

    python benchmarks/gpu_acceptance_report.py OUT

May be made at any time, also of a run that was killed, or while one goes on. Exit status 1 where something failed.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_counters import worst_stalls

from mambaout_kernels.audit import cuda, cuda_entries, cuda_predict
from mambaout_kernels.audit.devices import Device, devices
from mambaout_kernels.audit.roofline import Shape
from mambaout_kernels.benchmarking import plot, report
from mambaout_kernels.benchmarking.measure import Row
from mambaout_kernels.benchmarking.workloads import CONTENDERS, DTYPES, OWN

# Elements that must be read or written for each channel of the gate and pixel: u, y; and u, dy, du.
ELEMENTS_MOVED = {"fwd": 3, "bwd": 5}
COLOURS = {"bytes / bandwidth": "#b8b8b8", "machine code": "#e39b3b", "measured": "#2c6fbb"}
LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TITLES = {"op": "The op alone", "block": "Whole blocks", "model": "Whole models"}
CELL = ("subject", "mode", "variant", "label", "batch", "dtype", "autocast", "graph")


def shape_of(row: Row) -> Shape:
    return Shape(row["batch"], row["height"], row["width"], row["hidden"], row["conv_channels"])


def of_the_op(rows: Sequence[Row]) -> list[Row]:
    """Our timings of the op alone."""
    return [r for r in rows if r["subject"] == "op" and r["contender"] in OWN and "min_s" in r]


def seconds_by_bytes(row: Row, bandwidth: float) -> float:
    """What moving the bytes of the op takes at least, at the bandwidth of a copy."""
    elements = ELEMENTS_MOVED[row["mode"]] * row["hidden"] * shape_of(row).pixels
    return elements * DTYPES[row["dtype"]].itemsize / bandwidth


def datasheet() -> Device | None:
    """Of the GPU that is there."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return next((d for d in devices() if d.target == f"sm_{major}{minor}"), None)


@functools.cache
def _kernels(target: str) -> list[cuda.NativeKernel]:
    module = cuda.module_path()
    source = cuda_entries.code_target(cuda.targets(module), target) if module is not None else None
    return cuda.kernels(module, source) if module is not None and source is not None else []


def seconds_by_machine_code(row: Row, on: Device | None) -> float | None:
    """As `mambaout-kernels audit` predicts the CUDA C++ kernels from a datasheet; None for others."""
    if on is None or row["backend"] != "cuda" or not _kernels(on.target):
        return None
    shape, backward, size = shape_of(row), row["mode"] == "bwd", row["kernel_size"]
    element_bytes = DTYPES[row["dtype"]].itemsize
    aligned = cuda_entries.is_aligned(shape, element_bytes)
    kernel = cuda_entries.launched(_kernels(on.target), on, size, LONG_NAMES[row["dtype"]], backward, aligned)
    plan = cuda_entries.plan_of(shape, size, element_bytes, on, backward)
    packet = 16 // element_bytes if aligned else 1
    executed = cuda_predict.total(cuda_predict.work(kernel.code, backward), plan, shape, size, packet, kernel.lanes)
    found = cuda_predict.predict(executed, plan, shape, size, on, element_bytes, backward)
    return found.microseconds / 1e6


def predictions(rows: Sequence[Row], bandwidth: float | None) -> list[Row]:
    """Of each timing of the op: predicted and measured microseconds. The minimum is measured: others disturb."""
    on = datasheet()
    found = []
    for row in of_the_op(rows):
        entry = {key: row[key] for key in ("backend", "mode", "label", "batch", "dtype")}
        entry["bytes / bandwidth"] = None if bandwidth is None else seconds_by_bytes(row, bandwidth) * 1e6
        code = None
        with contextlib.suppress(Exception):  # no cuobjdump, no module: the report has to come all the same
            code = seconds_by_machine_code(row, on)
        entry["machine code"] = None if code is None else code * 1e6
        entry["measured"] = row["min_s"] * 1e6
        found.append(entry)
    return found


def prediction_table(entries: Sequence[Row]) -> report.Table:
    headings = ["backend", "op", "shape", "batch", "dtype", *(f"{name}, us" for name in COLOURS), "of the bandwidth"]
    lines = []
    for e in entries:
        line = [e["backend"], e["mode"], e["label"], str(e["batch"]), e["dtype"]]
        line += ["" if e[name] is None else f"{e[name]:.1f}" for name in COLOURS]
        bound = e["bytes / bandwidth"]
        lines.append([*line, "" if bound is None else f"{bound / e['measured']:.0%}"])
    return headings, lines


def _microseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw_predictions(path: Path, entries: Sequence[Row], title: str) -> bool:
    """Write a PNG: predicted and measured by shape, a panel for each backend, direction and dtype."""
    if not entries:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot, ticker

    kinds = list(dict.fromkeys((e["backend"], e["mode"], e["dtype"]) for e in entries))
    columns = min(2, len(kinds))
    widest = max(Counter((e["backend"], e["mode"], e["dtype"]) for e in entries).values())
    lines = -(-len(kinds) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        squeeze=False,
        layout="constrained",
        figsize=(max(5.2, 0.95 * widest) * columns, 0.9 + 2.6 * lines),
    )
    for ax in axes.flat[len(kinds) :]:
        ax.set_axis_off()
    names = [name for name in COLOURS if any(e[name] is not None for e in entries)]
    for ax, kind in zip(axes.flat, kinds, strict=False):
        members = [e for e in entries if (e["backend"], e["mode"], e["dtype"]) == kind]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            at = [i + (index - (len(names) - 1) / 2) * width for i, e in enumerate(members) if e[name] is not None]
            heights = [e[name] for e in members if e[name] is not None]
            bars = ax.bar(at, heights, 0.94 * width, label=name, color=COLOURS[name])
            if name == "measured":
                ax.bar_label(bars, fmt=_microseconds, fontsize=7, padding=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(ticker.NullFormatter())
        ax.margins(y=0.15)
        ax.set_xticks(range(len(members)), [f"{e['label']}\nbatch {e['batch']}" for e in members], fontsize=7.5)
        middle, half = (len(members) - 1) / 2, max(len(members), 2) / 2 + 0.1
        ax.set_xlim(middle - half, middle + half)
        ax.set_ylabel("microseconds", fontsize=8)
        ax.tick_params(axis="y", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(" ".join(kind), fontsize=10)
    handles = [patches.Patch(color=COLOURS[name], label=name) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"the op alone, predicted and measured\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


def markdown(table: report.Table) -> str:
    headings, lines = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


def attempted(write: Callable[[], bool]) -> bool:
    """Whether a plot was written; False without matplotlib, which is optional."""
    with contextlib.suppress(ImportError):
        return write()
    return False


def groups(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of each cell, by contender."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(key) for key in CELL), {})[row["contender"]] = row
    return found


def name_of(row: Row) -> str:
    how = f"{report.precision(row)}, batch {row['batch']}{', CUDA graph' if row.get('graph') else ''}"
    return f"{row['subject']} {row['mode']} {row['variant']} {row['label']}, {how}"


def lost(rows: Sequence[Row]) -> list[str]:
    """Cells in which something that computes the same is faster than the best of ours: by whom, and by how much."""
    found = []
    for by_name in groups(rows).values():
        timed = {name: row for name, row in by_name.items() if "median_s" in row and name != "naive"}
        ours = [row for name, row in timed.items() if name in OWN]
        others = [(name, row) for name, row in timed.items() if name not in OWN]
        if not ours or not others:
            continue
        own, (name, best) = min(r["median_s"] for r in ours), min(others, key=lambda other: other[1]["median_s"])
        if best["median_s"] < own:
            found.append(f"{name_of(best)}: {CONTENDERS[name]} by {own / best['median_s']:.2f}x")
    return found


def counters_table(records: Sequence[Row]) -> report.Table:
    headings = ["stage", "kernel", "us", "GB moved", "DRAM", "issue slots", "occupancy", "registers", "warps wait for"]

    def line(r: Row) -> list[str]:
        def shown(name: str, text: str, scale: float = 1.0) -> str:
            return text.format(r[name] * scale) if name in r else ""

        numbers = [shown("seconds", "{:.1f}", 1e6), shown("dram_bytes", "{:.3f}", 1e-9)]
        numbers += [shown(f"{name}_percent", "{:.0f} %") for name in ("dram", "issue", "occupancy")]
        return [str(r["stage"]), r["kernel"], *numbers, shown("registers", "{:.0f}"), worst_stalls(r["stalls"])]

    return headings, [line(record) for record in records]


def kernels_table(records: Sequence[Row], most: int = 8) -> report.Table:
    """The longest of each run; all of them are in the records."""
    lines = []
    for r in records:
        what = f"{r['subject']} {r['mode']} {r['label']}, {CONTENDERS[r['contender']]}"
        lines.append([what, f"{r['total_us']:.0f}", "", "all"])
        lines += [["", f"{us:.0f}", f"{count:g}", name] for us, count, name in r["kernels"][:most]]
    return ["run", "us", "launches", "kernel"], lines


def depthwise_table(rows: Sequence[Row]) -> report.Table:
    timed = [row for row in rows if "median_s" in row]
    lines = [[row["depthwise_kernel"], row["label"], f"{row['median_s'] * 1e6:.1f}"] for row in timed]
    return ["kernel", "shape", "eager, us"], lines


def read(path: Path) -> list[dict[str, Any]]:
    """The records; a line that was cut off by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def failures(records: Sequence[dict[str, Any]]) -> list[str]:
    """What went wrong: in a section, in what one of ours computed, and that one of ours did not run."""
    found = [f"{record['section']}: {record['text']}" for record in records if record["kind"] == "fail"]
    rows = [r for r in records if r["kind"] == "row" and r.get("mode") != "memory" and r["contender"] in OWN]
    for row in rows:
        if row.get("check") is False or "failure" in row:
            what = row.get("failure") or report.check_text(row)
            found.append(f"{name_of(row)}: {CONTENDERS[row['contender']]}: {what}")
    return found


def write(out: Path) -> list[str]:
    """REPORT.md and plots in `out`; what failed."""
    records = read(out / "results.jsonl")

    def of(kind: str) -> list[dict[str, Any]]:
        return [record for record in records if record["kind"] == kind]

    facts: dict[str, Any] = {}
    for record in of("fact"):
        facts |= {key: value for key, value in record.items() if key not in ("section", "kind")}
    bandwidth, dry = facts.pop("bandwidth", None), "card" not in facts
    machine = facts.get("card", "a CPU")
    facts["bandwidth of a copy"] = "not measured" if bandwidth is None else f"{bandwidth / 1e9:.0f} GB/s, measured"
    facts["sections, s"] = ", ".join(f"{r['section']} {r['seconds']:.0f}" for r in of("took"))
    timed = [row for row in of("row") if row.get("mode") != "memory"]
    rows = [row for row in timed if "depthwise_kernel" not in row]
    failed = failures(records)
    parts = [
        "# GPU acceptance" + (" (dry run on the CPU: no GPU time is in it)" if dry else ""),
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        "## Failures\n\n" + _listed(f"**FAILED** {text}" for text in failed),
    ]
    if rows:
        losses = "## Cells that are not ours\n\nWhere something that computes the same is faster.\n\n"
        parts.append(losses + _listed(lost(rows)))
    entries = predictions(rows, bandwidth)
    if entries:
        parts.append(
            "## Predicted beside measured\n\nThe op alone. Predicted, not measured: from the bytes that must move and "
            "the bandwidth of a copy; and for the CUDA C++ kernels from their machine code and the GPU's datasheet, as "
            "`mambaout-kernels audit` does. Measured: the minimum.\n\n" + markdown(prediction_table(entries))
        )
        if attempted(lambda: draw_predictions(out / "predicted.png", entries, machine)):
            parts.append("![predicted and measured](predicted.png)")
    for subject, title in TITLES.items():
        own = [row for row in rows if row["subject"] == subject]
        if own:
            parts += [f"## {title}", *_of_subject(own, out / f"{subject}.png", machine, dry)]
    for title, table in (
        ("Hardware counters, bf16, batch 128, by ncu", counters_table(of("counters"))),
        ("Kernels, by the profiler", kernels_table(of("kernels"))),
        ("Memory of a training step", report.memory_table(of("row"))),
        ("PyTorch's depthwise kernels", depthwise_table([row for row in timed if "depthwise_kernel" in row])),
    ):
        if table[1]:
            parts.append(f"## {title}\n\n{markdown(table)}")
    for title, kind in (("Findings", "note"), ("Left out", "left_out"), ("Clocks", "clocks")):
        if of(kind):
            parts.append(f"## {title}\n\n" + _listed(f"{r['section']}: {r['text']}" for r in of(kind)))
    (out / "REPORT.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return failed


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"- {text}" for text in texts) or "None."


def _of_subject(rows: Sequence[Row], image: Path, machine: str, dry: bool) -> list[str]:
    how = "" if dry else " By CUDA events, TF32 off for all, operands not in the L2 cache."
    parts = [f"Milliseconds: minimum / median.{how}"]
    for graph in dict.fromkeys(row.get("graph", False) for row in rows):
        of_kind = [row for row in rows if row.get("graph", False) == graph]
        parts += ["As CUDA graphs:"] * graph + [markdown(report.cells_table(of_kind))]
    if attempted(functools.partial(plot.draw, image, rows, machine)):
        parts.append(f"![{image.stem}]({image.name})")
    return parts


if __name__ == "__main__":
    failed = write(Path(sys.argv[1]))
    print((Path(sys.argv[1]) / "REPORT.md").read_text(encoding="utf-8"))
    sys.exit(1 if failed else 0)
