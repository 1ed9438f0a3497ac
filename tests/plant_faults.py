"""Plants faults, one at a time, in a copy of the sources; each must turn a test red.

    python tests/plant_faults.py [--only TEXT] [--part 1/3] [--copy FOLDER] [--python-only]

A test counts only if it passes on the sound copy. The compiled module is that of the CPU kernels, without CUDA, at -O1,
and of portable C++ alone where the fault is in it, too; after a fault only what depends on it is compiled again. What
needs an instruction set that this processor does not have is left out, and named. Prints a table; exit status 1 if a
fault went unseen.
"""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path

from faults import FAULTS, FaultySource

from mambaout_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "*_cache", "__pycache__", ".hypothesis", "*.so", "results")


class Copy:
    """The sources once more, in a folder that may be kept: what was compiled there is then compiled no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        scripts = os.path.dirname(sys.executable)
        self._environment["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, dirs_exist_ok=True, copy_function=self._copy)
        # Where cpu_launch looks for objects of the module, to link them instead of compiling them again.
        self._build = folder / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self._compiled_with = ("", "")  # units and fault of the module; not known of one that was kept

    @staticmethod
    def _copy(source: str, target: str) -> None:
        """What differs, and as new: an old date would let objects of another content pass for this one's."""
        if not os.path.exists(target) or Path(source).read_bytes() != Path(target).read_bytes():
            shutil.copyfile(source, target)

    def _run(self, *command, **environment) -> subprocess.CompletedProcess[str]:
        environment = {**self._environment, **environment}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def compile(self, units: str, with_fault: str = "") -> str:
        """ "", or what the compiler says."""
        if (units, with_fault) == self._compiled_with:
            return ""
        import pybind11

        configure = ["-S", ".", "-B", self._build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
                     f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DMAMBAOUT_CUDA=OFF",
                     f"-DMAMBAOUT_PORTABLE={'ON' if units == 'portable' else 'OFF'}",
                     f"-DMAMBAOUT_EMULATED_AMX={'ON' if units == 'amx' else 'OFF'}",
                     "-DCMAKE_BUILD_TYPE=Faults", "-DCMAKE_CXX_FLAGS_FAULTS=-O1"]  # fmt: skip
        install = ["--install", self._build, "--prefix", "mambaout_kernels", "--component", "cpu"]
        for arguments in (configure, ["--build", self._build, "--target", "_C"], install):
            done = self._run("cmake", *arguments)
            if done.returncode != 0:
                return done.stdout + done.stderr
        self._compiled_with = (units, with_fault)
        return ""

    def test(self, selected: str) -> tuple[int, str]:
        """pytest's exit status, and the test that failed first."""
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(selected)]
        interpreter = {"TRITON_INTERPRET": "1"} if "triton_interpreter" in selected else {}
        done = self._run(*command, **interpreter)
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - |$)", done.stdout, re.MULTILINE)
        return done.returncode, failed[1] if failed else done.stdout[-300:]

    @cache  # noqa: B019 (there is one copy)
    def sound(self, selected: str, units: str) -> str:
        """ "", or why the tests tell nothing: they have to pass without a fault."""
        if said := self.compile(units):
            return f"without a fault it does not compile: {said[-2000:]}"
        code, failed = self.test(selected)
        return "" if code == 0 else f"without a fault: exit status {code}, {failed}"

    def plant(self, fault: FaultySource) -> tuple[bool, str]:
        """Whether it was caught, and by what; or what else happened."""
        path = self.folder / fault.file
        text = path.read_text()
        if fault.right not in text:
            return False, f"the source no longer has {fault.right!r}"
        if unsound := self.sound(fault.test, fault.units):
            return False, unsound
        if not fault.compiled and (said := self.compile(fault.units)):
            return False, said
        path.write_text(text.replace(fault.right, fault.wrong, 1))
        try:
            if fault.compiled and (said := self.compile(fault.units, str(fault))):
                return False, f"does not compile: {said[-2000:]}"
            code, failed = self.test(fault.test)
        finally:
            path.write_text(text)
        if code < 0:
            return True, f"pytest ended by signal {-code}"
        return code == 1, failed if code == 1 else f"NOT CAUGHT: exit status {code}, {failed}"


def selected_faults(args: argparse.Namespace) -> list[FaultySource]:
    part, parts = map(int, args.part.split("/"))
    wanted = [f for f in FAULTS if args.only in str(f) and not (args.python_only and f.compiled)]
    wanted.sort(key=lambda f: (f.compiled, f.units))
    return [f for i, f in enumerate(wanted) if i * parts // len(wanted) == part - 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="faults that have this in their file, code or test")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="one of N parts of the list")
    parser.add_argument(
        "--copy", type=Path, metavar="FOLDER", help="kept from run to run, with what was compiled there"
    )
    parser.add_argument("--python-only", action="store_true", help="leave out what has to be compiled")
    args = parser.parse_args()
    supported = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()
    every, caught = selected_faults(args), 0
    faults = [fault for fault in every if fault.can_be_seen(supported)]
    for fault in every:
        if not fault.can_be_seen(supported):
            print(f"left out: {fault.place} needs {fault.isas}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy((args.copy or Path(folder) / "copy").resolve())
        for _, group in itertools.groupby(faults, lambda fault: (fault.compiled, fault.units)):
            together = list(group)
            for fault in together:
                copy.sound(fault.test, fault.units)  # of all first: then nothing is compiled for it between the faults
            for fault in together:
                begin = time.monotonic()
                seen, by = copy.plant(fault)
                caught += seen
                outcome = "caught" if seen else "FAILED"
                print(f"{outcome} ({time.monotonic() - begin:.0f} s) {fault.place}: {by}", flush=True)
    print(f"{caught} of {len(faults)} faults were caught, {len(every) - len(faults)} left out")
    return 0 if caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())
