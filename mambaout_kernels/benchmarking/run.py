"""Runs jobs in worker processes, one after the other, and gathers what they report."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import memory
from .measure import Row
from .worker import Job


@dataclass
class Outcome:
    rows: list[Row] = field(default_factory=list)
    disturbances: list[str] = field(default_factory=list)
    pinned: dict[int, int | None] = field(default_factory=dict)  # threads -> core
    fma_peak: dict[int, dict[str, float]] = field(default_factory=dict)  # threads -> dtype -> FLOP/s


class WorkerError(RuntimeError):
    """A worker ended before its job was done; the text is its own."""


def run(jobs: Iterable[Job], on_step: Callable[[Job, str], None]) -> Outcome:
    """Run jobs one at a time; `on_step` hears what is about to be measured."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="mambaout-kernels-") as folder:
        for job in jobs:
            for event in _events(replace(job, folder=folder)):
                if "step" in event:
                    on_step(job, event["step"])
                elif "rows" in event:
                    outcome.rows += event["rows"]
                else:
                    outcome.disturbances += event["disturbances"]
                    outcome.pinned[job.threads] = event["pinned"]
                    if event["fma_peak"]:
                        outcome.fma_peak[job.threads] = event["fma_peak"]
    return outcome


def _events(job: Job) -> Iterable[dict[str, Any]]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # torch.compile must be done compiling when the timing starts: no pool of compilers beside it.
    quiet = {"OMP_NUM_THREADS": str(job.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": path}
    if job.memory:
        environment |= memory.ENVIRONMENT
    command = [sys.executable, "-m", "mambaout_kernels.benchmarking.worker"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as worker,
    ):
        assert worker.stdin is not None
        assert worker.stdout is not None
        error, finished = None, False
        try:
            worker.stdin.write(job.to_json())
            worker.stdin.close()
            for line in worker.stdout:
                event = json.loads(line)
                error = event.get("error", error)
                finished = finished or "disturbances" in event
                if error is None:
                    yield event
            if not finished:
                log.seek(0)
                reason = error or f"exit status {worker.wait()}"
                raise WorkerError(f"{reason}\n{log.read()[-4000:].rstrip()}")
        finally:
            worker.kill()
