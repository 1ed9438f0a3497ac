"""The day a GPU is there: builds for it, is it right, how fast is it, beside what was predicted.

    python benchmarks/gpu_acceptance.py --plan A      build, correctness, behaviour, tests, sanitizers
    python benchmarks/gpu_acceptance.py --plan B      the op: times, hardware counters
    python benchmarks/gpu_acceptance.py --plan C      tiny in bf16 and under AMP: inference, training, memory, kernels
    python benchmarks/gpu_acceptance.py --plan D      base likewise
    python benchmarks/gpu_acceptance.py --plan E      both in float32, and blocks
    python benchmarks/gpu_acceptance.py --plan F      what MambaOut is compared with: the selective scan, token mixers
    python benchmarks/gpu_acceptance.py --dry ...     the same on the CPU, small, to see that it runs

From a bare checkout: needs torch, triton, nvcc, cmake, ninja and pybind11, and installs nothing. Every section is a
process of its own with a time limit, so that a crash or a hang ends that section only. What it finds is appended to
results.jsonl as it comes, and REPORT.md is made from that at the end, or at any time after:

    python benchmarks/gpu_acceptance_report.py OUT

Exit status 1 where a result is wrong, a section failed or a sanitizer complains.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_sections
from gpu_sections import PLANS, SECTIONS, Settings

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
LEAST_S = 10.0  # left, for a section to be begun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", choices=PLANS, default="A")
    parser.add_argument(
        "--only", action="append", choices=SECTIONS, help="this section instead of a plan's; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_acceptance"))
    parser.add_argument("--minutes", type=float, default=8.5, help="of all sections; default: %(default)s")
    parser.add_argument("--variant", default="mambaout_tiny")
    parser.add_argument("--commit", help="of this checkout, where it has no .git")
    parser.add_argument("--dry", action="store_true", help="on the CPU, small")
    parser.add_argument("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    until = args.until or time.time() + 60 * args.minutes
    settings = Settings(args.out.resolve(), args.variant, args.dry, until, args.commit)
    if args.child:
        return child(args.child, settings)
    if not args.dry and not gpu_sections.has_gpu():
        parser.error("torch sees no CUDA device; --dry runs the same sections on the CPU")
    for path in (settings.results, settings.log):
        path.unlink(missing_ok=True)
    run(args.only or PLANS[args.plan], settings)
    return report(settings)


def run(names: list[str] | tuple[str, ...], settings: Settings) -> None:
    """One section after the other; those that may run beside others are begun as soon as their turn comes."""
    beside: list[tuple[str, subprocess.Popen[bytes], float]] = []
    for name in names:
        if name == gpu_sections.WAIT:
            finish(beside, settings)
            continue
        limit = min(SECTIONS[name].limit_s, settings.left())
        if limit < LEAST_S:
            settings.record(name, "left_out", text="no time")
            continue
        print(f"... {name}", file=sys.stderr, flush=True)
        process = begin(name, settings, time.time() + limit)
        if SECTIONS[name].beside and not settings.dry:
            beside.append((name, process, time.time() + limit))
        else:
            end(name, process, limit, settings)
    finish(beside, settings)


def finish(beside: list[tuple[str, subprocess.Popen[bytes], float]], settings: Settings) -> None:
    for name, process, until in beside:
        end(name, process, max(1.0, until - time.time()), settings)
    beside.clear()


def begin(name: str, settings: Settings, until: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(HERE), "--child", name, "--out", str(settings.out), "--until", str(until)]
    command += ["--variant", settings.variant, *(["--dry"] if settings.dry else [])]
    command += ["--commit", settings.commit] if settings.commit else []
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    with settings.log.open("ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
        )


def end(name: str, process: subprocess.Popen[bytes], limit: float, settings: Settings) -> None:
    """Wait for a section; what it started ends with it."""
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        settings.record(name, "left_out", text=f"ended at its limit of {limit:.0f} s")
        return
    if status != 0:  # its own failures are records; this is a crash
        tail = settings.log.read_bytes()[-1500:].decode(errors="replace")
        settings.record(name, "fail", text=f"ended with status {status}: {tail}")


def child(name: str, settings: Settings) -> int:
    """One section, in this process."""
    started = time.time()
    try:
        for kind, content in SECTIONS[name].run(settings):
            settings.record(name, kind, **content)
    except Exception as error:
        kind = "left_out" if type(error).__name__ == "OutOfMemoryError" else "fail"
        settings.record(name, kind, text=f"{type(error).__name__}: {str(error).strip()[-1500:]}")
    settings.record(name, "took", seconds=time.time() - started)
    return 0


def report(settings: Settings) -> int:
    """By a process of its own, which a broken build cannot take with it; the records are there in any case."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(HERE.parent / "gpu_acceptance_report.py"), str(settings.out)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    raise SystemExit(main())
