"""Plants faults, one at a time, in a copy of the sources; each must turn a test red.

    python tests/plant_faults.py [--python-only]

A compiled fault is rebuilt through CMake into the copy's package. Prints a table; exit status 1 if a fault went unseen.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class FaultySource:
    file: str
    right: str
    wrong: str
    test: str  # what has to fail

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/")


FAULTS = [
    FaultySource("mambaout_kernels/ops.py", "ctx.save_for_backward(*tensors)",
                 "tensors[0].detach().mul_(1.5); ctx.save_for_backward(*tensors)",
                 "tests/test_complaints.py -k test_11"),
    FaultySource("mambaout_kernels/ops.py", "gradients = _backward_op(dy, u, weight, bias, ctx.act)",
                 "gradients = _backward_op(dy.contiguous().view(dy.shape) * 1.001, u, weight, bias, ctx.act)",
                 "tests/test_generated.py -k public_op"),
    FaultySource("mambaout_kernels/reference.py", "dc = _dwconv(e, weight.flip((2, 3))",
                 "dc = _dwconv(e, weight.flip((2,))", "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/reference.py", "    if c.numel() == 0:", "    if weight.shape[0] == 0:",
                 "tests/test_complaints.py -k zero_size"),
    FaultySource("mambaout_kernels/reference.py", "return s * (1 + x * (1 - s))", "return s * (1 + x * (1 + s))",
                 "tests/test_generated.py -k reference"),
    FaultySource("mambaout_kernels/checks.py", "weight.shape[2] % 2 == 0 or", "weight.shape[2] % 2 == 2 or",
                 "tests/test_bad_input.py"),
    FaultySource("mambaout_kernels/checks.py", "(u.dtype, torch.float32) if u.dtype in", "(u.dtype,) if u.dtype in",
                 "tests/test_ops.py -k 'fake or compiles'"),
    FaultySource("mambaout_kernels/packs.py", "found[0] == key and", "found[0][0] == key[0] and",
                 "tests/test_concurrency.py -k changed_parameters"),
    FaultySource("mambaout_kernels/whole_block.py", "norm.normalized_shape != (block.dim,) or", "",
                 "tests/test_complaints.py -k norm"),
    FaultySource("mambaout_kernels/checkpoints.py", "return _translate(state_dict, _TO_AUTHORS, \"timm's\")",
                 "return dict(state_dict)", "tests/test_checkpoints.py"),
    FaultySource("mambaout_kernels/backends/__init__.py", "    finally:\n        _forced = previous",
                 "    finally:\n        pass", "tests/test_backends.py"),
    FaultySource("mambaout_kernels/cli/special_values.py", "wrong = (ours.double() - exact).abs() >",
                 "wrong = (ours.double() - ours.double()).abs() >", "tests/test_cli.py -k special"),
    FaultySource("csrc/cpu/dispatch.cpp", "std::fill(sums, sums + count, 0.0);", "",
                 "tests/test_determinism.py -k op_at"),
    FaultySource("csrc/cpu/dispatch.cpp", "at.total = at.partials + at.partial_bytes * plan.rectangles() + kLine;",
                 "at.total = at.partials + at.partial_bytes * plan.rectangles();",
                 "tests/test_cpu_launch.py -k plain"),
    FaultySource("csrc/cpu/dispatch.cpp", "const bool alike = plan.groups == 1 && plan.columns == 1;",
                 "const bool alike = true;", "tests/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/dispatch.cpp", "b.h1 = part_begin(shape.H, strips, strip + 1);",
                 "b.h1 = part_begin(shape.H, strips, strip + 1) - (strips > 1);", "tests/test_cpu_kernels.py -k fp64"),
    FaultySource("csrc/cpu/block_dispatch.cpp", "return k - at.identity < shape.C ? k - at.identity + identity : -1;",
                 "return k - at.identity + identity;", "tests/test_cpu_launch.py -k 'block and plain'"),
    FaultySource("csrc/cpu/block_body.h", "- mean - off) * scale;", "- mean) * scale;",
                 "tests/test_cpu_launch.py -k alike"),
]  # fmt: skip


def plant(fault: FaultySource, copy: Path, environment: dict[str, str]) -> str:
    """ "caught", or what went wrong instead."""
    path = copy / fault.file
    text = path.read_text()
    if fault.right not in text:
        return f"the source no longer has {fault.right!r}"
    path.write_text(text.replace(fault.right, fault.wrong, 1))
    try:
        if fault.compiled:
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            built = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
            if "WARNING: mambaout_kernels is being installed without" in built.stderr:
                return "does not compile"
        words = fault.test.split(" ", 2)
        selected = [words[0], *([words[1], words[2].strip("'")] if len(words) > 1 else [])]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *selected]
        tested = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        return "caught" if tested.returncode == 1 else f"NOT CAUGHT: {tested.stdout[-200:]}"
    finally:
        path.write_text(text)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--python-only", action="store_true", help="leave out what has to be compiled")
    python_only = arguments.parse_args().python_only
    unseen = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*_cache", ".hypothesis"))
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        for fault in FAULTS:
            if python_only and fault.compiled:
                continue
            outcome = plant(fault, copy, environment)
            unseen += outcome != "caught"
            print(f"{fault.file}: {fault.wrong.strip()[:60]!r}: {fault.test}: {outcome}", flush=True)
    print("every fault was caught" if not unseen else f"{unseen} faults were not caught")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
