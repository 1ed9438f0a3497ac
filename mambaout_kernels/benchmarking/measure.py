"""From a cell to rows of results, one per contender."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .. import backends
from . import accuracy, machine, memory, overhead, shapes, workloads
from .timing import Timing, interleave
from .workloads import Cell

Row = dict[str, Any]
OWN_SHARE = 0.95  # of the time, that a pinned process should have its core


class Watch:
    """How undisturbed the stretches of time inside `with watch` were, seen from the process that worked there."""

    def __init__(self) -> None:
        self._before = machine.cpu_times()
        self._wall = self._cpu = 0.0

    def __enter__(self) -> None:
        self._wall -= time.perf_counter()
        self._cpu -= time.process_time()

    def __exit__(self, *_: object) -> None:
        self._wall += time.perf_counter()
        self._cpu += time.process_time()

    def disturbances(self, threads: int) -> list[str]:
        found = []
        steal = machine.stolen(self._before, machine.cpu_times())
        if steal > machine.STEAL_LIMIT:
            found.append(f"with {threads} threads, the hypervisor took away {steal:.0%} of the CPU time")
        if threads == 1 and self._cpu < OWN_SHARE * self._wall:
            share = self._cpu / self._wall
            found.append(f"with 1 thread, the process had its core for only {share:.0%} of the time")
        return found


def _described(cell: Cell, threads: int) -> Row:
    described = asdict(cell)
    shape = described.pop("shape")
    described.pop("contenders")
    if cell.subject == "model":
        shape = {"variant": cell.shape.variant, "image_size": cell.shape.image_size}
    return {**described, "label": cell.label, "threads": threads, **shape}


def _backend(cell: Cell, name: str) -> str:
    if name != "fused":
        return "PyTorch"
    like = torch.empty(1, dtype=workloads.DTYPES[cell.dtype], device=cell.device)
    chosen = []
    for stage in shapes.stages(cell.shape.variant) if cell.subject == "model" else (cell.shape,):
        u = like.expand(cell.batch, stage.height, stage.width, 2 * stage.hidden)
        weight = like.expand(stage.conv_channels, 1, stage.kernel_size, stage.kernel_size)
        for backward in {"fwd": (False,), "bwd": (True,)}.get(cell.mode, (False, True)):
            chosen.append(backends.select(u, weight, backward).__name__.rpartition(".")[2])  # type: ignore[attr-defined]
    return ", ".join(f"{b} ({machine.isa()})" if b == "cpu" else b for b in dict.fromkeys(chosen))


def _speedups(timings: dict[str, Timing], name: str) -> Row:
    """Eager's time over this contender's: the ratio of the medians, and of the minima."""
    if "eager" not in timings or name not in timings:
        return {"speedup": None, "speedup_min": None}
    eager, own = timings["eager"], timings[name]
    return {"speedup": eager.median / own.median, "speedup_min": eager.minimum / own.minimum}


def _timed(timing: Timing) -> Row:
    return {"min_s": timing.minimum, "median_s": timing.median, "repetitions": len(timing.seconds)}


def time_cell(cell: Cell, threads: int, budget_s: float, watch: Watch) -> list[Row]:
    """One row per contender. Where fused is wrong, its row has `check` false, times, and no speed-up."""
    checked = accuracy.worst(workloads.verify(cell)) if "fused" in cell.contenders else None
    workload = workloads.build(cell)
    synchronize: Callable[[], object] = torch.cuda.synchronize if cell.device == "cuda" else lambda: None
    with watch:
        timings = interleave(workload.contenders, budget_s, synchronize=synchronize)
    rows = []
    for name in cell.contenders:
        row = {**_described(cell, threads), "contender": name, "backend": _backend(cell, name)}
        if name in workload.failures:
            row["failure"] = workload.failures[name]
        else:
            row |= {**_timed(timings[name]), **_speedups(timings, name)}
            row["per_second"] = cell.batch / timings[name].median
        if name == "fused" and checked is not None:
            row["check"] = checked.passed
            row |= {f"check_{key}": value for key, value in asdict(checked).items()}
            if not checked.passed:
                row["speedup"] = row["speedup_min"] = None
        rows.append(row)
    return rows


def memory_cell(cell: Cell, threads: int) -> list[Row]:
    """One row per contender, of the bytes kept for backward and the peak of a training step; ratios to eager's."""
    names = [name for name in cell.contenders if name != "compile"]
    measured = {name: memory.measure(cell, name) for name in names}
    rows = []
    for name, (kept, peak) in measured.items():
        row = {**_described(cell, threads), "mode": "memory", "contender": name, "backend": _backend(cell, name)}
        row |= {"kept_bytes": kept, "peak_bytes": peak, "kept_ratio": None, "peak_ratio": None}
        if "eager" in measured:
            eager_kept, eager_peak = measured["eager"]
            row["kept_ratio"] = kept / eager_kept
            row["peak_ratio"] = peak / eager_peak if peak and eager_peak else None  # 0: below what can be seen
        rows.append(row)
    return rows


def overhead_rows(threads: int, budget_s: float) -> list[Row]:
    """Seconds per call of the public op and of the compiled one, and their difference."""
    timings = interleave(overhead.contenders(), budget_s)
    rows: list[Row] = []
    for name, timing in timings.items():
        row: Row = {"subject": "overhead", "mode": "fwd", "dtype": "fp32", "threads": threads, "contender": name}
        row |= {"min_s": timing.minimum / overhead.CALLS, "median_s": timing.median / overhead.CALLS}
        rows.append(row | {"repetitions": len(timing.seconds)})
    ours, native = rows
    difference: Row = {key: ours[key] - native[key] for key in ("min_s", "median_s")}
    return [*rows, ours | difference | {"contender": "difference"}]
