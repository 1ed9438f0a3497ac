"""The report of gpu_acceptance.py: measured beside predicted, as Markdown, JSON and plots."""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambaout_kernels.audit import cuda, cuda_entries, cuda_predict
from mambaout_kernels.audit.devices import Device, devices
from mambaout_kernels.audit.roofline import Shape
from mambaout_kernels.benchmarking import plot, report
from mambaout_kernels.benchmarking.measure import Row
from mambaout_kernels.benchmarking.workloads import DTYPES

# Elements that must be read or written for each channel of the gate and pixel: u, y; and u, dy, du.
ELEMENTS_MOVED = {"fwd": 3, "bwd": 5}
COLOURS = {"bytes / bandwidth": "#b8b8b8", "machine code": "#e39b3b", "measured": "#2c6fbb"}
LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def shape_of(row: Row) -> Shape:
    return Shape(row["batch"], row["height"], row["width"], row["hidden"], row["conv_channels"])


def of_the_op(rows: Sequence[Row]) -> list[Row]:
    """Our timings of the op alone."""
    wanted = ("op", "fused")
    return [
        r for r in rows if (r["subject"], r["contender"]) == wanted and r["mode"] in ELEMENTS_MOVED and "min_s" in r
    ]


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
    if on is None or row["run_on"] != "cuda" or not _kernels(on.target):
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
        entry = {key: row[key] for key in ("run_on", "mode", "label", "batch", "dtype")}
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
        line = [e["run_on"], e["mode"], e["label"], str(e["batch"]), e["dtype"]]
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

    kinds = list(dict.fromkeys((e["run_on"], e["mode"], e["dtype"]) for e in entries))
    columns = min(2, len(kinds))
    widest = max(Counter((e["run_on"], e["mode"], e["dtype"]) for e in entries).values())
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
        members = [e for e in entries if (e["run_on"], e["mode"], e["dtype"]) == kind]
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


def write(
    out: Path, facts: dict[str, Any], dry: bool, notes: Sequence[str], left_out: Sequence[str], rows: list[Row],
    bandwidth: float | None, seconds: float,
) -> None:  # fmt: skip
    """REPORT.md, results.json and plots in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    machine = facts["gpu"] if facts["gpu"] and not dry else facts["cpu"]
    entries = predictions(rows, bandwidth)
    copied = "not measured" if bandwidth is None else f"{bandwidth / 1e9:.0f} GB/s, measured"
    parts = [
        "# GPU acceptance" + (" (dry run on the CPU: no GPU time is in it)" if dry else ""),
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None)
        + f"\n- bandwidth of a copy: {copied}\n- took {seconds:.0f} s",
        "## Findings\n\n" + "\n".join(f"- {note}" for note in notes),
    ]
    if entries:
        parts.append(
            "## Predicted beside measured\n\nThe op alone. Predicted, not measured: from the bytes that must move and "
            "the bandwidth of a copy; and for the CUDA C++ kernels from their machine code and the GPU's datasheet, as "
            "`mambaout-kernels audit` does. Measured: the minimum.\n\n" + markdown(prediction_table(entries))
        )
        if attempted(lambda: draw_predictions(out / "predicted.png", entries, machine)):
            parts.append("![predicted and measured](predicted.png)")
    for name in dict.fromkeys(row["run_on"] for row in rows):
        own = [row for row in rows if row["run_on"] == name]
        parts.append(f"## {name}\n\nMilliseconds: minimum / median.\n\n{markdown(report.cells_table(own))}")
        image = out / f"{name.replace(', ', '_').replace(' ', '_')}.png"
        if attempted(functools.partial(plot.draw, image, own, f"{name}, {machine}")):
            parts.append(f"![{name}]({image.name})")
    if left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {what}" for what in left_out))
    (out / "REPORT.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    content = {"machine": facts, "dry": dry, "bandwidth": bandwidth, "notes": notes, "left_out": left_out}
    report.write_json(out / "results.json", report.finite({**content, "predictions": entries, "results": rows}))
