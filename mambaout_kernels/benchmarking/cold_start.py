"""Cold start: from nothing to a model that answers, each start in a process of its own (cold_start_process.py).

Python's own start is not in it. Files have just been written, so that they come from the system's cache.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..inference import optimize_for_inference
from . import accuracy, peers, workloads
from .workloads import Cell

LABELS = {
    "fused": "fused, from a checkpoint",
    "saved": "fused, from a saved inference model",
    "eager": "eager, from a checkpoint",
    **peers.NAMES,
}
OWN = ("fused", "saved", "eager")
STARTS = 3  # of each, in turns
SECONDS = ("ready_s", "import_s", "load_s", "first_s", "warm_s")
BYTES = ("steady_bytes", "peak_bytes")
_PROCESS = Path(__file__).with_name("cold_start_process.py")


def measure(cell: Cell, threads: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of each contender of the cell, a model: medians of seconds, bytes (None where the system does not tell), and the
    "comparison" of its first output with eager's; or why there is none, as "failure". `folder`: for its files.
    """
    starts, found = _prepared(cell, threads, folder)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in starts}
    for _ in range(STARTS):
        for name, start in starts.items():
            runs[name].append(_run(start))
    eager, exact = workloads.references(cell)
    for name, results in runs.items():
        y = torch.tensor(results[0]["y"])[: eager.shape[0]].to(eager.dtype)
        slack = peers.SLACK if name in peers.NAMES else accuracy.SLACK
        found[name] = {key: _median([result[key] for result in results]) for key in (*SECONDS, *BYTES)}
        found[name]["comparison"] = accuracy.compare("y", y, eager, exact, slack=slack)
    return found


def _prepared(cell: Cell, threads: int, folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what each process is told, by contender; of those that cannot start here, the failures)."""
    import numpy

    posed = workloads.problem(workloads.in_fp32(cell))
    assert posed.module is not None
    assert posed.x is not None
    model, x, dtype = posed.module.eval(), posed.x, workloads.DTYPES[cell.dtype]
    weights, saved = folder / "weights.pth", folder / "saved.safetensors"
    numpy.save(folder / "x.npy", x.numpy())
    torch.save(model.state_dict(), weights)
    starts, failures = {}, {}
    for name in cell.contenders:
        start = {"name": name, "x": str(folder / "x.npy"), "variant": cell.shape.variant, "threads": threads}
        start |= {"dtype": str(dtype).removeprefix("torch."), "file": str(saved if name == "saved" else weights)}
        if name == "saved":
            optimize_for_inference(model, dtype=dtype).save(saved)
        elif name in peers.NAMES:
            try:
                start |= _exported(name, cell, model, x, folder)
            except Exception as error:
                failures[name] = {"failure": workloads.failure(error)}
                continue
        starts[name] = start
    return starts, failures


def _exported(name: str, cell: Cell, model: nn.Module, x: Tensor, folder: Path) -> dict[str, Any]:
    """Of a peer, which is built here once, to see whether it can."""
    file = peers.export(folder, workloads.export_name(cell), model, x)
    peers.build(name, lambda: file, x, cell.dtype)
    return {"file": str(file), "dimensions": peers.dimensions(file, x)}


def _run(start: dict[str, Any]) -> dict[str, Any]:
    """RuntimeError, with what it wrote, where the process fails."""
    command = [sys.executable, "-c", _PROCESS.read_text(encoding="utf-8")]
    done = subprocess.run(command, input=json.dumps(start), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a cold start of {LABELS[start['name']]} failed: {done.stderr[-2000:].rstrip()}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
