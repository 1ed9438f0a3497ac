"""One process per number of threads: reads a job from stdin, writes events as lines of JSON to stdout.

A process of its own, because OpenMP's threads inherit the affinity of the thread that first needs them, and keep it.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .against import Against
from .latency import MOST_REQUESTS, Load
from .shapes import Shape
from .workloads import Cell


@dataclass
class Job:
    """On one number of threads: cells to time, whole and by parts, whose memory to measure, to load, to start cold, and
    models to compare."""

    threads: int
    budget_s: float
    timed: list[Cell] = field(default_factory=list)
    parts: list[Cell] = field(default_factory=list)
    memory: list[Cell] = field(default_factory=list)
    overhead: bool = False
    loads: list[Load] = field(default_factory=list)
    most_requests: int = MOST_REQUESTS
    cold_starts: list[Cell] = field(default_factory=list)
    against: list[Against] = field(default_factory=list)
    folder: str | None = None  # where exported models are kept for the jobs that follow

    @property
    def steps(self) -> int:
        cells = len(self.timed) + len(self.parts) + len(self.memory) + len(self.cold_starts)
        return cells + len(self.loads) + len(self.against) + int(self.overhead)

    @property
    def least_s(self) -> float:
        """What the timing takes at least: a budget for each step, and for each model of a comparison."""
        return self.budget_s * (self.steps + sum(each.models - 1 for each in self.against))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        content = json.loads(text)
        for key in ("timed", "parts", "memory", "cold_starts"):
            content[key] = [_cell(cell) for cell in content[key]]
        content["loads"] = [
            Load(_cell(load["cell"]), tuple(load["clients"]), load["workers"]) for load in content["loads"]
        ]
        content["against"] = [
            Against(tuple(map(_cell, each["cells"])), tuple(each["others"])) for each in content["against"]
        ]
        return cls(**content)


def _cell(content: dict[str, Any]) -> Cell:
    return Cell(**{**content, "shape": Shape(**content["shape"]), "contenders": tuple(content["contenders"])})


def _pin(threads: int) -> int | None:
    """Give a single thread a core to stay on; a team of threads is left to the system."""
    from . import machine

    if threads != 1 or not hasattr(os, "sched_setaffinity"):
        return None
    core = machine.idlest_core()
    os.sched_setaffinity(0, {core})
    return core


def events(job: Job) -> Iterator[dict[str, Any]]:
    """{"step": what comes next}, {"rows": [...]} after it; at the end {"pinned": core, "disturbances": [...],
    "fma_peak": FLOP/s by dtype, the best}."""
    import torch

    from . import measure

    pinned = None if job.loads or job.cold_starts else _pin(job.threads)  # workers need several cores
    torch.set_num_threads(job.threads)
    folder = None if job.folder is None else Path(job.folder)
    watch, peaks = measure.Watch(), measure.Peaks()
    for cell in job.timed:
        yield {"step": f"{cell.subject} {cell.mode} {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.time_cell(cell, job.threads, job.budget_s, watch, peaks.now(), folder)}
    for cell in job.parts:
        yield {"step": f"parts of {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.stage_rows(cell, job.threads, job.budget_s, peaks.now(), watch)}
    for each in job.against:
        cell = each.cells[0]
        yield {"step": f"{each.models} models {cell.mode} {cell.dtype}, batch {cell.batch}, against each other"}
        yield {"rows": measure.against_rows(each, job.threads, job.budget_s, watch, peaks)}
    disturbances = watch.disturbances(job.threads) if job.timed or job.parts or job.against else []
    disturbances += peaks.disturbances(job.threads)
    for cell in job.memory:
        yield {"step": f"memory of {cell.subject} {cell.mode} {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.memory_cell(cell, job.threads)}
    if job.overhead:
        yield {"step": "overhead of a call"}
        yield {"rows": measure.overhead_rows(job.threads, job.budget_s)}
    for load in job.loads:
        cell, clients = load.cell, ", ".join(map(str, load.clients))
        yield {"step": f"latency of {cell.label} {cell.dtype}, batch {cell.batch}, clients: {clients}"}
        yield {"rows": measure.latency_rows(load, job.threads, job.budget_s, job.most_requests, folder)}
    if job.loads:
        disturbances += watch.disturbances(job.threads)
    for cell in job.cold_starts:
        yield {"step": f"cold starts of {cell.label} {cell.dtype}"}
        assert folder is not None
        yield {"rows": measure.cold_start_rows(cell, job.threads, folder)}
    yield {"pinned": pinned, "disturbances": disturbances, "fma_peak": peaks.best()}


def main() -> None:
    job = Job.from_json(sys.stdin.read())
    # What anything else prints must not come between the events.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        try:
            for event in events(job):
                print(json.dumps(event), file=out, flush=True)
        except Exception as error:
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
