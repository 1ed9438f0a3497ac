"""The page of the documentation about one card, and its plots, from what was measured on it.

    python benchmarks/gpu_page.py benchmarks/measured/h100.json docs

Writes docs/h100.md, docs/plots/h100-models.svg and docs/plots/h100-op.svg. Needs matplotlib.
"""

import json
import sys
from pathlib import Path
from typing import Any

from mambaout_kernels.benchmarking import shapes
from mambaout_kernels.benchmarking.plot import COLOURS
from mambaout_kernels.benchmarking.workloads import CONTENDERS

Row = dict[str, Any]
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OP_CONTENDERS = ("cuda", "triton", "compile", "eager", "naive")
MODEL_CONTENDERS = (
    "eager",
    "timm-compile",
    "timm-reduce-overhead",
    "modules",
    "fused",
    "fused-graphs",
    "compile-fused",
)
COMPILED = ("timm-compile", "timm-reduce-overhead", "compile")
OWN = ("fused", "fused-graphs", "compile-fused", "modules", "cuda", "triton")


def table(headings: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *lines))


def milliseconds(row: Row | None) -> str:
    return "" if row is None or row.get("min_s") is None else f"{1e3 * row['min_s']:.2f}"


def cells(rows: list[Row], subject: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by contender, of each cell and run: (mode, precision, batch, label, commit)."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["subject"] == subject and not row["graph"] and row.get("min_s"):
            precision = f"{row['dtype']}, AMP" if row["autocast"] else row["dtype"]
            cell = (row["mode"], precision, row["batch"], row["label"], row["commit"])
            found.setdefault(cell, {})[row["contender"]] = row
    return found


def model_table(rows: list[Row]) -> str:
    lines = []
    for (mode, precision, batch, label, commit), by_name in sorted(cells(rows, "model").items(), key=str):
        compiled = [by_name[n]["min_s"] for n in COMPILED if n in by_name]
        ours = [by_name[n]["min_s"] for n in OWN if n in by_name]
        times = [milliseconds(by_name.get(name)) for name in MODEL_CONTENDERS]
        ratio = f"{min(compiled) / min(ours):.2f}" if compiled and ours else ""
        lines.append([label, mode, precision, str(batch), commit, *times, ratio])
    names = [CONTENDERS[name] for name in MODEL_CONTENDERS]
    return table(["model", "mode", "dtype", "batch", "commit", *names, "ours over torch.compile"], lines)


def share(row: Row, bandwidth: float) -> float:
    """Of the bandwidth of a copy, that moving each input and output once takes."""
    stage = next(s for s in shapes.stages(row["variant"]) if s.label == row["label"])
    elements = {"fwd": 3, "bwd": 5}[row["mode"]] * stage.hidden * stage.height * stage.width * row["batch"]
    return float(elements * BYTES[row["dtype"]] / bandwidth / row["min_s"])


def op_table(rows: list[Row], bandwidth: float) -> str:
    lines = []
    for (mode, precision, batch, label, _commit), by_name in cells(rows, "op").items():
        times = [f"{1e6 * by_name[n]['min_s']:.0f}" if n in by_name else "" for n in OP_CONTENDERS]
        of_copy = f"{share(variant_of(by_name['cuda']), bandwidth):.0%}" if "cuda" in by_name else ""
        lines.append([label, mode, precision, str(batch), *times, of_copy])
    names = [CONTENDERS[name] for name in OP_CONTENDERS]
    return table(["stage", "mode", "dtype", "batch", *names, "CUDA C++, of a copy's bandwidth"], lines)


def backward_table(rows: list[Row]) -> str:
    """Of the op: one kernel beside several."""
    lines = []
    for r in rows:
        shape = f"{r['map']}x{r['map']}x{r['conv_channels']}"
        ratio = r["one_kernel_us"] / r["split_us"]
        times = [f"{r['one_kernel_us']:.0f}", f"{r['split_us']:.0f}", f"{ratio:.2f}"]
        lines.append([shape, str(r["hidden"]), r["dtype"], str(r["batch"]), *times])
    return table(["conv channels", "hidden", "dtype", "batch", "one kernel", "split", "times as fast"], lines)


def norm_table(rows: list[Row]) -> str:
    """Of each width the fastest tile."""
    lines = []
    for dim in dict.fromkeys(r["dim"] for r in rows):
        best = min((r for r in rows if r["dim"] == dim), key=lambda r: float(r["backward_us"]))
        times = [
            f"{best[key]:.0f}" for key in ("pytorch_forward_us", "forward_us", "pytorch_backward_us", "backward_us")
        ]
        lines.append([f"{best['map']}x{best['map']}x{dim}", *times])
    return table(["norm of", "PyTorch forward", "ours", "PyTorch backward", "ours"], lines)


def variant_of(row: Row) -> Row:
    """Some rows do not say it: the first that has this stage."""
    for variant in ("mambaout_tiny", "mambaout_base"):
        if any(stage.label == row["label"] for stage in shapes.stages(variant)):
            return {**row, "variant": row.get("variant") or variant}
    raise LookupError(row["label"])


def bars(path: Path, groups: list[tuple[str, dict[str, float]]], names: tuple[str, ...], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mambaout-kernels"  # the same file from the same figures
    from matplotlib import pyplot

    shown = [name for name in names if any(name in values for _, values in groups)]
    figure, ax = pyplot.subplots(figsize=(1.6 + 1.9 * len(groups), 3.6), layout="constrained")
    width = 0.86 / len(shown)
    for index, name in enumerate(shown):
        at = [i for i, (_, values) in enumerate(groups) if name in values]
        heights = [groups[i][1][name] for i in at]
        places = [i + (index - (len(shown) - 1) / 2) * width for i in at]
        drawn = ax.bar(places, heights, 0.94 * width, label=CONTENDERS[name], color=COLOURS[name])
        ax.bar_label(drawn, fmt="%.1f" if max(heights) >= 3 else "%.2f", fontsize=6.5, padding=1)
    ax.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def speedups(by_name: dict[str, Row]) -> dict[str, float]:
    eager = by_name["eager"]["min_s"]
    return {name: eager / row["min_s"] for name, row in by_name.items() if row.get("min_s")}


def draw(rows: list[Row], folder: Path, card: str) -> None:
    folder.mkdir(exist_ok=True)
    models = {  # of each cell the last run
        (label, mode, precision, batch): (commit, speedups(by_name))
        for (mode, precision, batch, label, commit), by_name in cells(rows, "model").items()
        if batch >= 64 and "eager" in by_name
    }
    groups = [
        (f"{label.removeprefix('mambaout_')} {mode}\n{precision}, batch {batch}\n{commit}", values)
        for (label, mode, precision, batch), (commit, values) in models.items()
    ]
    bars(folder / f"{card}-models.svg", groups, MODEL_CONTENDERS[1:], "models: times as fast as eager")
    op = [
        (f"{label}\n{mode}, {precision}", speedups(by_name))
        for (mode, precision, batch, label, _commit), by_name in cells(rows, "op").items()
        if batch == 128 and precision == "bf16" and "eager" in by_name and label in LABELS
    ]
    bars(folder / f"{card}-op.svg", op, ("naive", "compile", "triton", "cuda"), "the op: times as fast as eager")


LABELS = tuple(stage.label for stage in shapes.stages("mambaout_tiny"))


def page(measured: dict[str, Any], card: str) -> str:
    facts, rows = measured["facts"], measured["rows"]
    failures = "\n".join(
        f"- {f['section']} ({f['commit']}): {f['text'].splitlines()[0][:160]}. Since then: {f.get('since', 'open')}."
        for f in measured["failures"]
    )
    return f"""# Measured on an {card.upper()}

Made by `python benchmarks/gpu_page.py benchmarks/measured/{card}.json docs` from
all that was measured, `benchmarks/measured/{card}.json`: {facts["card"]}, driver
{facts["nvidia-smi"].partition(",")[0]}, torch {facts["torch"]}, triton {facts["triton"]}, CUDA {facts["nvcc"]}. A copy
moves {measured["bandwidth_bytes_per_s"] / 1e12:.2f} TB/s. Minima; a row of the file names its commit.
{measured["notes"]}

## Models

![Models: times as fast as eager](plots/{card}-models.svg)

Milliseconds; a line is one run, in which contenders took turns. "eager" and "torch.compile of timm" compute the same
with the same weights. The last column is the fastest torch.compile over the fastest of ours.

{model_table(rows)}

## The op

![The op: times as fast as eager](plots/{card}-op.svg)

Microseconds. The share is of the time in which a copy moves 3 (forward) or 5 (backward) times hidden channels of a
pixel, which is what the op reads and writes once.

{op_table(rows, measured["bandwidth_bytes_per_s"])}

## The op's backward, in one kernel and split

Microseconds as CUDA graphs. The split one runs from 2^19 values of the convolution on, where shapes are aligned.

{backward_table(measured["backward_paths"]["rows"])}

## Norms

Microseconds, bf16, batch 128; PyTorch's backward has mean and deviation given, ours computes them again and writes
norm(x) besides.

{norm_table(measured["norms"]["rows"])}

## What failed there, and since

{failures}
"""


def main(path: Path, docs: Path) -> None:
    measured = json.loads(path.read_text(encoding="utf-8"))
    draw(measured["rows"], docs / "plots", path.stem)
    (docs / f"{path.stem}.md").write_text(page(measured, path.stem), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
