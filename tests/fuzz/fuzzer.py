"""Calls every op on CPU tensors with valid, unusual and wrong arguments; nothing of it may do harm.

    python tests/fuzz/fuzzer.py [--calls 3000] [--seed 0] [--first 0] [--op TEXT] [--messages] [--sanitize]

A call returns what it should, or raises an exception that says in a sentence what was wrong; it changes none of its
inputs, and does not take long. Call i of a seed is the same wherever it is made: --seed S --first I --calls 1 makes one
again. Calls are made in another process (checks.py), whose end by a signal is a failure of the call that it was making;
the next process goes on behind it. --sanitize: with a module compiled under AddressSanitizer and UBSan, kept in
build/fuzz.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
# As cpu_launch's; and without vptr, for which not all types of libtorch's are exported.
FLAGS = (
    "-g1 -fno-omit-frame-pointer -fno-sanitize-recover=all -Og -fsanitize=address,undefined,float-cast-overflow"
    " -fno-sanitize=null,object-size,vptr --param asan-instrumentation-with-call-threshold=0"
)
HANGS = 60.0  # seconds without a call that ends
MOST_FAILURES = 20


def sanitized_environment() -> dict[str, str]:
    """Compiles the module, and copies the package beside it; a process in this environment loads the copy."""
    import pybind11

    build, package = ROOT / "build" / "fuzz", ROOT / "build" / "fuzz" / "tree" / "mambaout_kernels"
    environment = {**os.environ, "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])}
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DMAMBAOUT_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Sanitized",
         f"-DCMAKE_CXX_FLAGS_SANITIZED={FLAGS}"],
        ["cmake", "--build", build, "--target", "_C", "--parallel", "2"],
    ):  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "mambaout_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", package)
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")  # the latter for exceptions
    ]
    return {
        **environment,
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(TESTS)]),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=16384",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def ends(child: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits; ends it where no call has ended for too long."""
    last, since = b"", time.monotonic()
    while child.poll() is None:
        time.sleep(0.05)
        now = log.read_bytes() if log.exists() else b""
        if now != last:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > HANGS:
            child.send_signal(signal.SIGABRT)  # Python prints where it is
            child.wait()
            return False
    return True


class Run:
    """What failed; how often each op returned and refused; how often it said what."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.failures = args, list[str]()
        self.counts: dict[str, Counter[str]] = {}
        self.messages: Counter[str] = Counter()
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))
        environment = sanitized_environment() if args.sanitize else {**os.environ, "PYTHONPATH": path}
        first, end = args.first, args.first + args.calls
        with tempfile.TemporaryDirectory() as folder:
            while first < end and len(self.failures) < MOST_FAILURES:
                first = self._batch(environment, Path(folder) / "log", first, min(args.batch, end - first))
                print(f"{first - args.first} calls, {len(self.failures)} failures", flush=True)

    def _batch(self, environment: dict[str, str], log: Path, first: int, count: int) -> int:
        """Makes so many calls; the one to go on with."""
        args, output, summary = self.args, log.with_name("output"), log.with_name("log.json")
        for path in (log, summary):
            path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fuzz.checks", log, args.seed, args.op, first, count]
        with open(output, "wb") as to:
            child = subprocess.Popen(
                list(map(str, command)), cwd=log.parent, env=environment, stdout=to, stderr=subprocess.STDOUT
            )
            ended = "it hangs" if not ends(child, log) else f"the process ended with {child.returncode}"
        again = f"python tests/fuzz/fuzzer.py --calls 1 --seed {args.seed} --op '{args.op}' --first"
        if child.returncode == 0:
            found = json.loads(summary.read_text())
            assert not args.sanitize or found["module"].startswith(str(ROOT / "build" / "fuzz")), found["module"]
            self.failures += [f"{wrong}\n    {again} {index}" for index, wrong in found["failures"]]
            for name, counted in found["counts"].items():
                self.counts.setdefault(name, Counter()).update(counted)
            self.messages.update(found["messages"])
            return found["next"]
        at = int(log.read_bytes() or first) if log.exists() else first
        said = output.read_text(errors="replace")
        report = re.search(r"(ERROR: AddressSanitizer|\S+ runtime error: |Fatal Python error)(.*\n){,20}", said)
        call = f"{said.splitlines()[0]}\n" if count == 1 and said else ""
        self.failures.append(f"call {at}: {ended}\n    {again} {at}\n{call}{report[0] if report else said[-1500:]}")
        return at + 1

    def table(self) -> str:
        columns = ("returned", "refused", "left out")
        lines = [f"{name:30}" + "".join(f"{n[c]:10}" for c in columns) for name, n in sorted(self.counts.items())]
        total = sum(self.counts.values(), Counter())
        return "\n".join([
            f"{'op':30}" + "".join(f"{c:>10}" for c in columns), *lines,
            f"{total['returned']} calls returned, {total['refused']} were refused, {total['left out']} left out, which "
            f"would compute for long; {total['compared']} results compared",
        ])  # fmt: skip


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="I", help="the first call")
    parser.add_argument("--op", default="", metavar="TEXT", help="ops that have this in their name")
    parser.add_argument("--batch", type=int, default=10000, help="calls of a process")
    parser.add_argument("--messages", action="store_true", help="print what was said, and how often")
    parser.add_argument("--sanitize", action="store_true")
    return parser.parse_args(given)


def main() -> int:
    args, begin = arguments(), time.monotonic()
    print(f"seed {args.seed}", flush=True)
    run = Run(args)
    for message, count in sorted(run.messages.items()) if args.messages else ():
        print(f"{count:6} {message}")
    print(f"{run.table()}; {time.monotonic() - begin:.0f} s")
    print("\n".join(run.failures) if run.failures else "no failure")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
