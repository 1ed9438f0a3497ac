"""Makes every condition of a module true, then false, one at a time, in a copy; each must turn one of its tests red.

    python tests/mutate_conditions.py [mambaout_kernels/nn/plain.py ...]

Without arguments, of every file in GUARDS. Prints what survived, and the score; exit status 1 if anything did that is
not in EQUAL. What is compiled is taken from here.
"""

import argparse
import ast
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_ELIGIBILITY = "tests/nn/test_eligibility.py"
_PLAIN = "tests/nn/test_plain.py"
_OPTIMIZE = "tests/inference/test_optimize.py -k left_to_the_modules or causal or hang_on"

# The guards: what decides whether an op may stand in for modules, and which backend runs. With the tests of each.
GUARDS = {
    "mambaout_kernels/nn/plain.py": [_ELIGIBILITY, _PLAIN, _OPTIMIZE],
    "mambaout_kernels/nn/eligibility.py": [_ELIGIBILITY, _PLAIN, _OPTIMIZE],
    "mambaout_kernels/nn/linear.py": ["tests/nn/test_linear_layers.py", "tests/triton_interpreter/test_plain_norms.py"],
    "mambaout_kernels/nn/alignment.py": ["tests/nn/test_alignment.py"],
    "mambaout_kernels/backends/__init__.py": [
        "tests/backends/test_backends.py",
        "tests/nn/test_transforms.py",
        "tests/test_compilers.py -k onnx_by_torchs or test_export",
    ],
    "mambaout_kernels/backends/checks.py": [
        "tests/backends/test_checks.py",
        "tests/ops/test_bad_input.py",
        "tests/ops/test_ops.py",
        "tests/ops/test_linear.py",
    ],
}

# (file, condition, value): nothing can tell these from the original, and why; where they survive, they do not count.
EQUAL: dict[tuple[str, str, bool], str] = {
    ("mambaout_kernels/nn/plain.py", "_any_global_hook is None", False): "this torch has it",
    ("mambaout_kernels/nn/eligibility.py", "kernel[0] != kernel[1]", False): "the op refuses it as well",
    ("mambaout_kernels/nn/plain.py", "torch._C._len_torch_function_stack() == 0", False): "the rest says so, slower",
    ("mambaout_kernels/nn/linear.py", "x.is_cuda", False): "not of a machine without a GPU",
    # Shortcuts to the same numbers.
    ("mambaout_kernels/nn/linear.py", "x.is_cuda", True): "normalises asks it again",
    ("mambaout_kernels/nn/linear.py", "backends.forced() != 'triton'", False): "normalises asks it again",
    ("mambaout_kernels/nn/alignment.py", "odd", True): "no zeros are needed then",
    ("mambaout_kernels/nn/alignment.py", "after_i", True): "of no zeros there are as many as before",
    ("mambaout_kernels/nn/alignment.py", "after_c", True): "of no zeros there are as many as before",
    ("mambaout_kernels/nn/alignment.py", "pad", True): "of no zeros there are as many as before",
    ("mambaout_kernels/nn/alignment.py", "low is None", False): "a conversion to no dtype is none",
    ("mambaout_kernels/nn/alignment.py", "pad == zeros.shape[dim]", False): "a part of all is all",
    ("mambaout_kernels/backends/__init__.py", "usable is None", True): "asked again, with the same answer",
    ("mambaout_kernels/backends/__init__.py", "torch.compiler.is_exporting()", True): "what comes after it decides",
    ("mambaout_kernels/backends/__init__.py", "torch.jit.is_tracing()", True): "what comes after it decides",
    ("mambaout_kernels/backends/__init__.py", "name is None", False): "a compiler's graph is made once more",
    ("mambaout_kernels/backends/__init__.py", "torch.compiler.is_dynamo_compiling()", False): "of torch before 2.14",
    # Of machines without compiled kernels (tests/test_fallback_install.py), or with a GPU.
    **{("mambaout_kernels/backends/__init__.py", condition, value): "not of a machine with kernels and without a GPU"
       for condition, values in {
           "torch.cuda.is_available()": (True, False), "_available(device_type)": (True,), "available": (True,),
           "len(_CANDIDATES[device_type]) == 1": (True,), "load(name).unavailable() is None": (True,),
           "name is not None": (True, False), "reason is not None": (False,),
           "torch.compiler.is_compiling()": (True, False),
       }.items() for value in values},
}  # fmt: skip


def conditions(tree: ast.AST) -> Iterator[ast.expr]:
    """Every part of a condition that is true or false by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield from _parts(node.test)
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                yield from _parts(test)
        elif isinstance(node, ast.Return) and node.value is not None and _is_boolean(node.value):
            yield from _parts(node.value)


def _is_boolean(node: ast.expr) -> bool:
    if isinstance(node, ast.BoolOp):
        return all(_is_boolean(value) for value in node.values)
    return isinstance(node, ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not))


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _parts(node.operand)
    else:
        yield node


def replaced(source: str, node: ast.expr, value: bool) -> str:
    lines = source.splitlines(keepends=True)
    assert node.end_lineno is not None
    begin = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    return source[:begin] + str(value) + source[end:]


def passes(folder: Path, tests: list[str]) -> bool:
    return all(_passes(folder, selected) for selected in tests)


def _passes(folder: Path, selected: str) -> bool:
    """Whether pytest passes in `folder`, in a child that has torch already."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        if "triton_interpreter" in selected:
            os.environ["TRITON_INTERPRET"] = "1"
        import pytest

        paths, _, expression = selected.partition(" -k ")
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        os._exit(int(pytest.main([*options, *paths.split(), *(["-k", expression] if expression else [])])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def mutate(folder: Path, file: str, tests: list[str]) -> tuple[int, list[str]]:
    """(mutants, those that survived) of one file."""
    path = folder / file
    source = path.read_text()
    if not passes(folder, tests):
        return 1, [f"{file}: its tests fail without a mutation"]
    survived, count = [], 0
    for node in conditions(ast.parse(source)):
        text = ast.unparse(node)
        for value in (True, False):
            count += 1
            path.write_text(replaced(source, node, value))
            begin = time.monotonic()
            try:
                alive = passes(folder, tests)
            finally:
                path.write_text(source)
            if alive and (file, text, value) in EQUAL:
                count -= 1
            elif alive:
                survived.append(f"{file}:{node.lineno}: {text} -> {value}")
                print(f"survived ({time.monotonic() - begin:.0f} s) {survived[-1]}", flush=True)
    return count, survived


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(GUARDS), help="of GUARDS")
    import torch

    torch.set_num_threads(1)  # of children, too
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    total, alive = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("mambaout_kernels", "tests", "csrc"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for file in parser.parse_args().files:
            begin = time.monotonic()
            count, survived = mutate(folder, file, GUARDS[file])
            total, alive = total + count, alive + len(survived)
            print(f"{file}: {count - len(survived)} of {count} killed, {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{total - alive} of {total} mutants were killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
