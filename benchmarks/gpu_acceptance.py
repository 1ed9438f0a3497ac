"""The day a GPU is there: correct on it? how fast, beside what was predicted? One command, one report, ten minutes.

    python benchmarks/gpu_acceptance.py            on the CUDA device
    python benchmarks/gpu_acceptance.py --dry      the same steps on the CPU backends, small, to see that they run

Writes REPORT.md, results.json and plots to --out. Exit status 1 where a result is wrong or a sanitizer complains.
Predictions are bytes that must move over the bandwidth of a copy, measured in the same run: a lower bound on the time.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import machine, measure, plot, report, shapes
from mambaout_kernels.benchmarking.measure import Row
from mambaout_kernels.benchmarking.workloads import DTYPES, Cell

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEPTHWISE_KERNELS = ("auto", "cudnn", "native")  # whose depthwise convolution PyTorch runs
# Elements that must be read or written for each channel of the gate and pixel: u, y; and u, dy, du.
ELEMENTS_MOVED = {"fwd": 3, "bwd": 5}


@dataclass
class Acceptance:
    device: str
    deadline: float
    budget_s: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: bool = False

    def fail(self, what: str) -> None:
        self.failed = True
        self.notes.append(f"**FAILED**: {what}")

    def in_time(self, what: str) -> bool:
        if time.monotonic() < self.deadline:
            return True
        self.left_out.append(what)
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_acceptance"))
    parser.add_argument("--dry", action="store_true", help="on the CPU backends, small")
    parser.add_argument("--variant", choices=shapes.variants(), default=shapes.variants()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="nothing is begun after nine tenths of them")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs the same steps on the CPU")
    deadline = time.monotonic() + 54 * args.minutes
    run = Acceptance("cpu" if args.dry else "cuda", deadline, budget_s=0.05 if args.dry else 0.3)
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()

    step("correctness")
    usable = usable_backends(run)
    for backend in usable:
        check(run, backend, args.dry)
    step("compute-sanitizer")
    sanitize(run, args.dry)
    step("bandwidth")
    bandwidth = copy_bandwidth(run.device)
    for backend in usable:
        step(f"benchmarks of {backend}")
        with backends.force(backend):
            for cell in cells(run.device, args.variant, args.dry):
                time_cell(run, cell, backend)
    if not args.dry:
        sweep_depthwise_kernels(run, args.variant)

    write(run, args.out, usable, bandwidth, time.monotonic() - started)
    print((args.out / "REPORT.md").read_text())
    return 1 if run.failed else 0


def step(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def usable_backends(run: Acceptance) -> list[str]:
    """The backends for the device that can be used here; the others are noted with the reason."""
    wanted = ("triton", "cuda") if run.device == "cuda" else ("cpu",)
    status = backends.status()
    for name in wanted:
        if status[name] is None:
            run.notes.append(f"backend {name}: usable")
        else:
            run.fail(f"backend {name} cannot be used here: {status[name]}")
    return [name for name in wanted if status[name] is None]


def check(run: Acceptance, backend: str, dry: bool) -> None:
    """`mambaout-kernels check`: forward and every gradient against fp64."""
    command = [sys.executable, "-m", "mambaout_kernels", "check", "--backend", backend, "--json"]
    command += ["--dtype", "fp32"] if dry else ["--full", "--dtype", "fp32,bf16,fp16"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        findings = json.loads(done.stdout)["findings"]
    except (json.JSONDecodeError, KeyError):
        run.fail(f"check of {backend} did not finish: {done.stderr.strip()[-500:]}")
        return
    wrong = [finding for finding in findings if not finding["passed"]]
    if done.returncode != 0 or wrong:
        run.fail(f"check of {backend}: {len(wrong)} of {len(findings)} findings are wrong")
    else:
        run.notes.append(f"check of {backend}: {len(findings)} findings, all within the tolerance")


def sanitize(run: Acceptance, dry: bool) -> None:
    """The compiled kernels under compute-sanitizer, where it is installed; Triton's allocate as PyTorch does."""
    program = shutil.which("compute-sanitizer")
    if program is None or dry or backends.status()["cuda"] is not None:
        reason = "a dry run" if dry else "not installed" if program is None else "no CUDA module"
        run.notes.append(f"compute-sanitizer: left out ({reason})")
        return
    call = (
        "import torch; from mambaout_kernels.backends import cuda\n"
        "for D, C, dtype in ((40, 24, torch.float32), (41, 17, torch.bfloat16)):\n"
        "    u, dy = (torch.randn(2, 9, 11, n, device='cuda').to(dtype) for n in (2 * D, D))\n"
        "    p = torch.randn(C, 1, 7, 7, device='cuda'), torch.randn(C, device='cuda')\n"
        "    cuda.gated_dwconv(u, *p, 'gelu'); cuda.gated_dwconv_backward(dy, u, *p, 'gelu')\n"
        "torch.cuda.synchronize()"
    )
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation
    for tool in SANITIZERS:
        if not run.in_time(f"compute-sanitizer {tool}"):
            continue
        command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-name", "kernel_substring=mambaout"]
        try:
            done = subprocess.run(
                [*command, sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            run.left_out.append(f"compute-sanitizer {tool}: over two minutes")
            continue
        if done.returncode == 0:
            run.notes.append(f"compute-sanitizer {tool}: no errors")
        else:
            run.fail(f"compute-sanitizer {tool}: {(done.stdout + done.stderr).strip()[-500:]}")


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy: the best of several."""
    source = torch.zeros(1 << (28 if device == "cuda" else 25), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cells(device: str, variant: str, dry: bool) -> Iterator[Cell]:
    """The op in full, the block and the model at their ends; torch.compile, slow to build, only at the large batch."""
    stages = shapes.stages(variant, [4] if dry else [])
    batches = (1,) if dry else (1, 128)
    dtypes = ("fp32",) if dry else ("bf16", "fp32")
    for dtype in dtypes:
        for batch in batches:
            for stage in stages:
                for mode in ("fwd", "bwd"):
                    with_compile = not dry and batch > 1 and dtype == "bf16" and mode == "fwd"
                    others = ("compile",) if with_compile else ()
                    yield Cell("op", mode, dtype, batch, stage, ("fused", "eager", "naive", *others), device=device)
    for dtype in dtypes:
        for batch in batches:
            for stage in (stages[0], stages[-1])[: len(stages)]:
                for mode in ("fwd", "train"):
                    yield Cell("block", mode, dtype, batch, stage, device=device)
    for dtype in dtypes:
        for mode in ("fwd", "train"):
            yield Cell("model", mode, dtype, batches[-1], stages[0], device=device)


def time_cell(run: Acceptance, cell: Cell, backend: str) -> None:
    label = f"{backend}: {cell.subject} {cell.mode} {cell.label} {cell.dtype} batch {cell.batch}"
    if not run.in_time(label):
        return
    step(label)
    try:
        rows = measure.time_cell(cell, torch.get_num_threads(), run.budget_s, measure.Watch())
    except torch.OutOfMemoryError:
        run.left_out.append(f"{label}: out of memory")
        return
    for row in rows:
        if row.get("check") is False:
            run.fail(f"{label}: {report.check_text(row)}")
        run.rows.append({**row, "run_on": backend})


def sweep_depthwise_kernels(run: Acceptance, variant: str) -> None:
    """Eager and torch.compile of the op with every choice of depthwise kernel, where this torch has the choice."""
    if not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        run.notes.append("depthwise kernel of PyTorch: this torch has no choice of it")
        return
    for name in DEPTHWISE_KERNELS:
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel=name):
            for stage in shapes.stages(variant):
                cell = Cell("op", "fwd", "bf16", 128, stage, ("eager", "compile"), device="cuda")
                time_cell(run, cell, f"PyTorch, depthwise kernel {name}")


def predicted_seconds(row: Row, bandwidth: float) -> float | None:
    """What moving the bytes of the op takes at least; None for other subjects."""
    if row["subject"] != "op" or row["mode"] not in ELEMENTS_MOVED or row["contender"] != "fused":
        return None
    pixels = row["batch"] * row["height"] * row["width"]
    return ELEMENTS_MOVED[row["mode"]] * pixels * row["hidden"] * DTYPES[row["dtype"]].itemsize / bandwidth


def prediction_table(rows: list[Row], bandwidth: float) -> report.Table:
    headings = ["backend", "op", "shape", "batch", "dtype", "predicted, us", "measured, us", "of the bandwidth"]
    lines = []
    for row in rows:
        predicted = predicted_seconds(row, bandwidth)
        if predicted is not None and "median_s" in row:
            lines.append([row["run_on"], row["mode"], row["label"], str(row["batch"]), row["dtype"],
                          f"{predicted * 1e6:.1f}", f"{row['median_s'] * 1e6:.1f}",
                          f"{predicted / row['median_s']:.0%}"])  # fmt: skip
    return headings, lines


def markdown(table: report.Table) -> str:
    headings, lines = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, ["---"] * len(headings), *lines))


def write(run: Acceptance, out: Path, usable: list[str], bandwidth: float, seconds: float) -> None:
    facts: dict[str, Any] = machine.description()
    parts = [
        "# GPU acceptance" + (" (dry run on the CPU: no GPU time is in it)" if run.device == "cpu" else ""),
        "\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        f"- copy bandwidth: {bandwidth / 1e9:.0f} GB/s, measured\n- took {seconds:.0f} s",
        "## Findings\n\n" + "\n".join(f"- {note}" for note in run.notes),
        "## Predicted beside measured\n\nPredicted: bytes that must move over the bandwidth of a copy.\n\n"
        + markdown(prediction_table(run.rows, bandwidth)),
    ]
    for name in dict.fromkeys(row["run_on"] for row in run.rows):
        rows = [row for row in run.rows if row["run_on"] == name]
        parts.append(f"## {name}\n\n{markdown(report.cells_table(rows))}")
        image = out / f"{name.replace(', ', '_').replace(' ', '_')}.png"
        with contextlib.suppress(ImportError):  # matplotlib is optional
            if plot.draw(image, rows, f"{name}, {facts['gpu'] or facts['cpu']}"):
                parts.append(f"![{name}]({image.name})")
    if run.left_out:
        parts.append("## Left out\n\n" + "\n".join(f"- {what}" for what in run.left_out))
    (out / "REPORT.md").write_text("\n\n".join(parts) + "\n")
    content = {"machine": facts, "backends": usable, "bandwidth": bandwidth, "notes": run.notes, "results": run.rows}
    report.write_json(out / "results.json", report.finite(content))


if __name__ == "__main__":
    raise SystemExit(main())
