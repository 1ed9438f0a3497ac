"""What machine this is, and whether it is quiet enough to time anything on it."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backends
from ..backends.cpu import multiplies_bf16

BUSY_LIMIT = 0.10  # share of the CPUs' time that others use, before
STEAL_LIMIT = 0.02  # share that the hypervisor gave to other machines, before and during


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> list[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def isa() -> str | None:
    """The instruction set of the compiled CPU kernels in use; None without them."""
    if backends.status()["cpu"] is not None:
        return None
    from .. import _C

    return _C.cpu_capability()


def isa_reason() -> str | None:
    """Why that is not a better one; None where there is none to tell, or no compiled kernels."""
    if isa() is None:
        return None
    from .. import _C

    return _C.cpu_capability_reason() or None


def fma_peak(repetitions: int = 5, milliseconds: float = 20.0) -> dict[str, float]:
    """The most FLOP/s of all of PyTorch's threads at once, measured now: "fp32", and "bf16" where it is multiplied.

    Multiply-adds on registers, of the instruction set in use, the best of some repetitions. Empty without the compiled
    kernels.
    """
    if isa() is None:
        return {}
    from .. import _C

    dtypes = ("fp32", "bf16") if multiplies_bf16() else ("fp32",)
    return {
        dtype: max(sum(_C.fma_flops(dtype == "bf16", milliseconds)) for _ in range(repetitions)) for dtype in dtypes
    }


def commit() -> str | None:
    """The git commit of the source tree that the package runs from, "+" appended where files differ from it."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def description() -> dict[str, Any]:
    """The machine and the versions, as results state them."""
    return {
        "cpu": cpu_model(),
        "cores": len(usable_cores()),
        "isa": isa(),
        "isa_reason": isa_reason(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mambaout_kernels": __version__,
        "commit": commit(),
    }


@dataclass(frozen=True)
class CpuTimes:
    """Seconds, in clock ticks, that one core has spent."""

    total: int
    idle: int
    steal: int


def cpu_times() -> dict[int, CpuTimes]:
    """By core, since boot; empty where the system does not tell."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return {}
    times = {}
    for line in lines:
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu" and len(fields) >= 8:
            # user nice system idle iowait irq softirq steal; guest time is counted in user already
            ticks = [int(field) for field in fields[:8]]
            times[int(name[3:])] = CpuTimes(sum(ticks), ticks[3] + ticks[4], ticks[7])
    return times


def shares(before: dict[int, CpuTimes], after: dict[int, CpuTimes]) -> dict[int, tuple[float, float]]:
    """(busy, steal) of each core between two readings, as shares of the time passed."""
    result = {}
    for core in before.keys() & after.keys():
        total = max(1, after[core].total - before[core].total)
        idle = after[core].idle - before[core].idle
        result[core] = 1 - idle / total, (after[core].steal - before[core].steal) / total
    return result


def idlest_core(sample_s: float = 0.25) -> int:
    """The usable core that was least busy for the last moment; the last one of equals."""
    before = cpu_times()
    time.sleep(sample_s)
    busy = {core: share for core, (share, _) in shares(before, cpu_times()).items()}
    return min(reversed(usable_cores()), key=lambda core: round(busy.get(core, 0.0), 2))


def unquiet(sample_s: float = 0.5) -> list[str]:
    """Why timings taken now would not be worth much; empty on a quiet machine. Watches it for `sample_s` seconds."""
    before = cpu_times()
    time.sleep(sample_s)
    usable = usable_cores()
    seen = [share for core, share in shares(before, cpu_times()).items() if core in usable]
    if not seen:
        return []
    reasons = []
    busy, steal = (sum(values) / len(seen) for values in zip(*seen, strict=True))
    if busy > BUSY_LIMIT:
        load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        reasons.append(f"before the start, other work took {busy:.0%} of {len(seen)} cores{load}")
    if steal > STEAL_LIMIT:
        reasons.append(f"before the start, the hypervisor took away {steal:.0%} of the CPU time")
    return reasons


def stolen(before: dict[int, CpuTimes], after: dict[int, CpuTimes]) -> float:
    """The share of the time between two readings that the hypervisor gave to other machines, over the usable cores."""
    usable = usable_cores()
    seen = [steal for core, (_, steal) in shares(before, after).items() if core in usable]
    return sum(seen) / len(seen) if seen else 0.0
