"""Hardware counters by ncu: what is asked for, and its answer as numbers."""

import csv
import sys
from pathlib import Path
from typing import Any

# Names of ncu's; what they are called here.
METRICS = {
    "gpu__time_duration.sum": "seconds",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__t_bytes.sum": "l2_bytes",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
STALLS = (
    "long_scoreboard", "short_scoreboard", "barrier", "membar", "math_pipe_throttle", "lg_throttle", "mio_throttle",
    "wait", "not_selected", "no_instruction", "dispatch_stall", "branch_resolving", "sleeping", "drain",
)  # fmt: skip
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_SCALES = {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0, "ns": 1e-9, "us": 1e-6, "ms": 1e-3,
           "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}  # fmt: skip


def command(program: str, stage: int) -> list[str]:
    """ncu over one forward and one backward of the CUDA C++ kernels at a stage (gpu_behaviour.py)."""
    metrics = [*METRICS, *(_STALL.format(name) for name in STALLS)]
    return [
        program, "--clock-control", "none", "--csv", "--print-units", "base", "--print-kernel-base", "demangled",
        "--kernel-name-base", "demangled", "--kernel-name", "regex:mambaout", "--metrics", ",".join(metrics),
        sys.executable, str(Path(__file__).with_name("gpu_behaviour.py")), str(stage),
    ]  # fmt: skip


def parse(text: str) -> list[dict[str, Any]]:
    """A record per kernel, in the order of their launches: its name, the numbers, and stalls by reason.

    ncu prints what the program printed and lines of its own ("==PROF== ...") before a table with a line per metric.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines[start:]):
        name, value = line.get("Metric Name"), (line.get("Metric Value") or "").replace(",", "")
        kernel = kernels.setdefault(line["ID"], {"kernel": short(line["Kernel Name"]), "stalls": {}})
        try:
            number = float(value) * _SCALES.get(line.get("Metric Unit") or "", 1.0)
        except ValueError:  # "n/a": not on this card
            continue
        if name in METRICS:
            kernel[METRICS[name]] = number
        else:
            reasons = [reason for reason in STALLS if _STALL.format(reason) == name]
            kernel["stalls"].update(dict.fromkeys(reasons, number))
    return list(kernels.values())


def short(name: str) -> str:
    """The function's own name, of a demangled one with namespaces, template arguments and parameters."""
    plain = name.replace("(anonymous namespace)", "").replace("<unnamed>", "").partition("(")[0].partition("<")[0]
    return plain.split()[-1].rpartition("::")[2]


def worst_stalls(stalls: dict[str, float], count: int = 3) -> str:
    """The reasons for which most warps wait when an instruction is issued, and how many."""
    found = sorted(stalls.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in found if value > 0)
