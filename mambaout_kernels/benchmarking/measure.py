"""From a cell to rows of results, one per contender."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .. import backends
from . import accuracy, against, cold_start, latency, machine, memory, overhead, peers, shapes, stages, workloads
from .accuracy import Comparison
from .against import Against, Entrant
from .latency import Load, Requests
from .timing import Contender, Timing, by_cuda_events, by_host, interleave
from .workloads import Cell, Workload

Row = dict[str, Any]
OWN_SHARE = 0.95  # of the time, that a pinned process should have its core
STEADY = 0.9  # of the best FMA peak, that those measured at other times should reach


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


class Peaks:
    """The FMA peak of PyTorch's threads, measured for every cell anew: a neighbour on a shared core may halve it."""

    def __init__(self) -> None:
        self._found: list[dict[str, float]] = []

    def now(self) -> dict[str, float]:
        """FLOP/s by dtype."""
        self._found.append(machine.fma_peak())
        return self._found[-1]

    def best(self) -> dict[str, float]:
        """Of all that were measured; empty if none was, or without the compiled kernels."""
        return {dtype: max(peaks[dtype] for peaks in self._found) for dtype in (self._found or [{}])[0]}

    def disturbances(self, threads: int) -> list[str]:
        found = []
        for dtype, best in self.best().items():
            lowest = min(peaks[dtype] for peaks in self._found)
            if lowest < STEADY * best:
                found.append(
                    f"with {threads} thread{'s' if threads > 1 else ''}, the processor's own peak in {dtype} fell to "
                    f"{lowest / best:.0%} of its best at times: compare times within a cell, not across cells"
                )
        return found


def _described(cell: Cell, threads: int) -> Row:
    described = asdict(cell)
    shape = described.pop("shape")
    described.pop("contenders")
    if cell.subject == "model":
        shape = {"variant": cell.shape.variant, "image_size": cell.shape.image_size}
    return {**described, "label": cell.label, "threads": threads, **shape}


def _backend(cell: Cell, name: str) -> str:
    if name in peers.NAMES:
        return peers.version(name)
    if name in workloads.FORCED:
        return name
    if name not in workloads.OWN:
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


def _rate(flops: int | None, cell: Cell, seconds: float, peak: dict[str, float]) -> Row:
    """FLOP per sample, FLOP/s, and its share of the FMA peak in what the dtype is multiplied in here, where known."""
    if not flops:
        return {}
    rate = flops * cell.batch / seconds
    best = peak.get("bf16" if cell.dtype == "bf16" and "bf16" in peak else "fp32")
    share = None if best is None or cell.dtype == "fp64" or cell.device != "cpu" else rate / best
    return {"flops": flops, "flop_per_s": rate, "peak_share": share}


def _checked(cell: Cell, workload: Workload) -> dict[str, Comparison]:
    """Of ours that could be built, the comparison that is nearest to failing, by name."""
    names = [name for name in cell.contenders if name in workloads.OWN and name not in workload.failures]
    return {name: accuracy.worst(workloads.verify(cell, name)) for name in names}


def _check(comparison: Comparison) -> Row:
    details = {f"check_{key}": value for key, value in asdict(comparison).items()}
    return {"check": comparison.passed, "check_excess": comparison.excess, **details}


def _settle(threads: int, names: Iterable[str]) -> Callable[[], object]:
    """Waits where the threads of another runtime have to go to sleep first."""
    beside = threads > 1 and any(name in peers.NAMES for name in names)
    return (lambda: time.sleep(peers.SETTLE_S)) if beside else lambda: None


def time_cell(
    cell: Cell,
    threads: int,
    budget_s: float,
    watch: Watch,
    peak: dict[str, float] | None = None,
    folder: Path | None = None,
    verify: bool = True,
) -> list[Row]:
    """One row per contender. Where one of ours is wrong, its row has `check` false, times, and no speed-up.

    `peak`: machine.fma_peak() of the same threads, just before; `folder`: where exported models are kept; verify False:
    it was done elsewhere, and rows have no `check`.
    """
    workload = workloads.build(cell, folder)
    checked = _checked(cell, workload) if verify else {}
    flops = stages.problem_flops(workloads.problem(cell)) if cell.mode == "fwd" and cell.device == "cpu" else None
    settle = _settle(threads, cell.contenders)
    stopwatch = by_cuda_events() if cell.device == "cuda" else by_host()
    with watch:
        timings = interleave(workload.contenders, budget_s, stopwatch=stopwatch, settle=settle)
    rows = []
    for name in cell.contenders:
        row = {**_described(cell, threads), "contender": name, "backend": _backend(cell, name)}
        if name in workload.failures:
            row["failure"] = workload.failures[name]
        else:
            row |= {**_timed(timings[name]), **_speedups(timings, name)}
            row["per_second"] = cell.batch / timings[name].median
            if name != "naive":  # which is another network
                row |= _rate(flops, cell, timings[name].median, peak or {})
        if name in checked:
            row |= _check(checked[name])
            if not checked[name].passed:
                row["speedup"] = row["speedup_min"] = None
        rows.append(row)
    return rows


def stage_rows(cell: Cell, threads: int, budget_s: float, peak: dict[str, float], watch: Watch) -> list[Row]:
    """One row per part of a model and contender (fused, eager), and one of their sum."""
    parts = stages.parts(cell)
    with watch:
        timings = interleave(stages.contenders(cell, parts), budget_s)
    flops = [stages.flops(part.module, part.x) for part in parts]
    rows = []
    for name in stages.CONTENDERS:
        own, eager = ([timings[f"{each} {part.name}"] for part in parts] for each in (name, "eager"))
        figures = [*zip([part.name for part in parts], own, eager, flops, strict=True)]
        figures.append(("sum", _sum(own), _sum(eager), sum(flops)))
        for part_name, timing, eager_timing, operations in figures:
            row = {**_described(cell, threads), "subject": "part", "part": part_name, "contender": name}
            row |= {"backend": _backend(cell, name), **_timed(timing), **_rate(operations, cell, timing.median, peak)}
            row |= _speedups({"eager": eager_timing, name: timing}, name)
            rows.append(row)
    return rows


def _sum(timings: list[Timing]) -> Timing:
    """Round by round."""
    return Timing([sum(seconds) for seconds in zip(*(timing.seconds for timing in timings), strict=True)])


def memory_cell(cell: Cell, threads: int) -> list[Row]:
    """One row per contender: bytes kept and at the peak, of a training step or an inference; ratios to eager's."""
    names = [name for name in cell.contenders if name not in workloads.MAY_FAIL]
    measured = {name: memory.measure(cell, name) for name in names}
    rows = []
    for name, (kept, peak) in measured.items():
        row = {**_described(cell, threads), "mode": "memory", "of": cell.mode, "contender": name}
        row["backend"] = _backend(cell, name)
        row |= {"kept_bytes": kept, "peak_bytes": peak, "kept_ratio": None, "peak_ratio": None}
        if "eager" in measured:
            eager_kept, eager_peak = measured["eager"]
            row["kept_ratio"] = kept / eager_kept if eager_kept else None
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


def against_rows(found: Against, threads: int, budget_s: float, watch: Watch, peaks: Peaks) -> list[Row]:
    """One row per model and how it runs. One that is wrong has `check` false; others then have no time at all.

    `budget_s` is of each model.
    """
    entrants = against.entrants(found)
    cell = found.cells[0]
    stopwatch = by_cuda_events() if cell.device == "cuda" else by_host()
    contenders = [entrant.contender for entrant in entrants if entrant.contender is not None]
    before = peaks.now()  # here: checks may have taken minutes
    with watch:
        timings = interleave(contenders, budget_s * found.models, stopwatch=stopwatch)
    peak = {dtype: max(rate, before[dtype]) for dtype, rate in peaks.now().items()}
    variants = {entrant.model: entrant.facts["parameters"] for entrant in entrants if entrant.how != "as made"}
    cells = {cell.label: cell for cell in found.cells}
    rows = [_entrant_row(cells.get(each.model, cell), each, threads, timings, peak) for each in entrants]
    fused = {row["label"]: row for row in rows if row["contender"] == "fused" and row.get("check")}
    for row in rows:
        if "parameters" in row:
            row["nearest"] = against.nearest(row["parameters"], variants)
            timed = "median_s" in row and row.get("check", True) and row["nearest"] in fused
            row["times_fused"] = row["per_second"] / fused[row["nearest"]]["per_second"] if timed else None
    return rows


def _entrant_row(cell: Cell, entrant: Entrant, threads: int, timings: dict[str, Timing], peak: dict[str, float]) -> Row:
    """Without what is relative to MambaOut."""
    row = {**_described(cell, threads), "subject": "against", "label": entrant.model, "contender": entrant.how}
    row["backend"] = _scan_backend(cell, entrant) if entrant.how == "as made" else _backend(cell, entrant.how)
    row |= entrant.facts
    del row["variant"]
    if entrant.contender is not None:
        timing = timings[entrant.contender.name]
        row |= {**_timed(timing), "per_second": cell.batch / timing.median}
        if cell.mode == "fwd" and row["macs"] is not None:
            row |= _rate(2 * row["macs"], cell, timing.median, peak)
    if entrant.comparison is not None:
        row |= _check(entrant.comparison)
    return row if entrant.failure is None else row | {"failure": entrant.failure}


def _scan_backend(cell: Cell, entrant: Entrant) -> str:
    if not against.made_here(entrant.model):
        return "PyTorch"
    name = against.scan_backend(cell)
    return f"PyTorch, scan: {name} ({machine.isa()})" if name == "cpu" else f"PyTorch, scan: {name}"


def latency_rows(load: Load, threads: int, budget_s: float, most: int, folder: Path | None) -> list[Row]:
    """One row per number of clients and contender. One that is wrong has `check` false and no figures."""
    cell = load.cell
    workload = workloads.build(cell, folder)
    checked = _checked(cell, workload)
    right = [each for each in workload.contenders if each.name not in checked or checked[each.name].passed]
    rows = []
    with ExitStack() as stack:
        servers = {each.name: stack.enter_context(latency.serving(_workers(load, each, folder))) for each in right}
        for ask in servers.values():
            latency.drive(ask, load.workers, 0.0, 0)  # warm-up
        for clients in load.clients:
            found = latency.take_turns(servers, clients, budget_s, most, _settle(threads, servers))
            for name in cell.contenders:
                row = {**_described(cell, threads), "subject": "latency", "clients": clients, "workers": load.workers}
                row |= {"contender": name, "backend": _backend(cell, name)}
                row |= _check(checked[name]) if name in checked else {}
                row |= {"failure": workload.failures[name]} if name in workload.failures else {}
                row |= _requests(found[name], cell) if name in found else {}
                rows.append(row)
    return rows


def _workers(load: Load, contender: Contender, folder: Path | None) -> list[Contender]:
    """One for each worker: calls of ours and of eager share the model, another runtime has a session of each."""
    if contender.name not in peers.NAMES:
        return [contender] * load.workers
    alone = replace(load.cell, contenders=(contender.name,))
    return [contender, *(workloads.build(alone, folder).contenders[0] for _ in range(1, load.workers))]


def _requests(requests: Requests, cell: Cell) -> Row:
    percentiles = {f"p{percent}_s": latency.percentile(requests.seconds, percent) for percent in latency.PERCENTS}
    return {**percentiles, "requests": len(requests.seconds), "per_second": requests.per_second * cell.batch}


def cold_start_rows(cell: Cell, threads: int, folder: Path) -> list[Row]:
    """One row per contender. One that is wrong has `check` false and no figures."""
    rows = []
    measured = cold_start.measure(cell, threads, folder)
    for name in cell.contenders:
        found = measured[name]
        row = {**_described(cell, threads), "subject": "cold start", "contender": name, "starts": cold_start.STARTS}
        comparison = found.pop("comparison", None)
        if comparison is not None:
            row |= _check(comparison)
        if comparison is None or comparison.passed:
            row |= found
        rows.append(row)
    return rows
