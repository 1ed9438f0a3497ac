"""Imports run one way, and heavy or optional packages are imported where they are used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mambaout_kernels"

# A module may import what stands above it. Anything not named here (analysis, audit, benchmarking, cli, ...) is on top.
LAYERS = ["reference", "backends", "ops", "nn", "models", "weights", "integrations", "inference"]


def layer(path: Path) -> int:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return LAYERS.index(name) if name in LAYERS else len(LAYERS)


def own_imports(path: Path):
    """Names of the package's own top-level modules that a file imports."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[:-1])[: len(parts) - node.level]
            module = base + (node.module.split(".") if node.module else [])
            yield from [module[0]] if module else [alias.name for alias in node.names]


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    for name in own_imports(path):
        if name in LAYERS:
            assert LAYERS.index(name) <= layer(path), f"{path.name} imports {name}, which stands above it"
        elif name not in ("_C", "_C_cuda", "version"):
            assert layer(path) == len(LAYERS), f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_who_wants_the_block_never_meets_what_it_is_compared_with(path):
    if path.relative_to(PACKAGE).parts[0] not in ("comparators", "cli", "benchmarking"):
        assert "comparators" not in own_imports(path)


def test_the_check_sees_imports():
    assert set(own_imports(PACKAGE / "ops" / "gated_dwconv.py")) == {"backends", "reference"}


# Run as a program by its text, not imported.
PROGRAM = PACKAGE / "benchmarking" / "cold_start_process.py"


@pytest.mark.parametrize("path", [f for f in FILES if f != PROGRAM], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_of_its_own_are_relative(path):
    """Under another name, as `kernels` loads a copy, an absolute one would find the installed package, or none."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert PACKAGE.name not in [name.split(".")[0] for name in names], f"line {node.lineno}"


def test_the_reference_imports_only_torch():
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    roots = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert roots <= {"torch", "math", "collections"}


def test_import_is_light():
    heavy = [
        "mambaout_kernels.comparators",
        "timm",
        "triton",
        "matplotlib",
        "rich",
        "typer",
        "skimage",
        "PIL",
        "safetensors",
        "torchvision",
    ]
    # whatever torch itself imports is not ours
    code = f"""
import sys, torch
before = set(sys.modules)
import mambaout_kernels
print([m for m in {heavy} if m in set(sys.modules) - before])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


ISA_UNITS = ["kernels_avx2.cpp", "kernels_avx512.cpp", "kernels_avx512_bf16.cpp", "kernels_amx_bf16.cpp"]


@pytest.mark.parametrize("unit", ISA_UNITS)
def test_isa_units_include_no_torch_and_no_stl(unit):
    """An inline function compiled there could end up in the rest of the program, with instructions it may not have."""
    seen, todo = set(), [ROOT / "csrc" / "cpu" / unit]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for quoted, name in re.findall(r'^#include ([<"])([^>"]+)', path.read_text(), re.MULTILINE):
            if quoted == "<":
                assert name in ("cstdint", "immintrin.h"), f"{path.name} includes {name}"
            else:
                todo.append((path.parent / name).resolve())
    assert len(seen) > 5
