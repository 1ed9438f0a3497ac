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

from .shapes import Shape
from .workloads import Cell


@dataclass
class Job:
    """Cells to time, to time part by part, and whose memory to measure, on one number of threads."""

    threads: int
    budget_s: float
    timed: list[Cell] = field(default_factory=list)
    parts: list[Cell] = field(default_factory=list)
    memory: list[Cell] = field(default_factory=list)
    overhead: bool = False
    folder: str | None = None  # where exported models are kept for the jobs that follow

    @property
    def steps(self) -> int:
        return len(self.timed) + len(self.parts) + len(self.memory) + int(self.overhead)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        content = json.loads(text)
        for key in ("timed", "parts", "memory"):
            content[key] = [
                Cell(**{**cell, "shape": Shape(**cell["shape"]), "contenders": tuple(cell["contenders"])})
                for cell in content[key]
            ]
        return cls(**content)


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

    pinned = _pin(job.threads)
    torch.set_num_threads(job.threads)
    folder = None if job.folder is None else Path(job.folder)
    watch, peaks = measure.Watch(), measure.Peaks()
    for cell in job.timed:
        yield {"step": f"{cell.subject} {cell.mode} {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.time_cell(cell, job.threads, job.budget_s, watch, peaks.now(), folder)}
    for cell in job.parts:
        yield {"step": f"parts of {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.stage_rows(cell, job.threads, job.budget_s, peaks.now(), watch)}
    disturbances = watch.disturbances(job.threads) if job.timed or job.parts else []
    disturbances += peaks.disturbances(job.threads)
    for cell in job.memory:
        yield {"step": f"memory of {cell.subject} {cell.mode} {cell.label} {cell.dtype}, batch {cell.batch}"}
        yield {"rows": measure.memory_cell(cell, job.threads)}
    if job.overhead:
        yield {"step": "overhead of a call"}
        yield {"rows": measure.overhead_rows(job.threads, job.budget_s)}
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
