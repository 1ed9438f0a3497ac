"""What was built, and what an installation without a compiler is."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mambaout_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

needs_module = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
needs_nm = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("nm") is None, reason="reads ELF symbols with nm"
)


def symbols(path: Path, *flags: str) -> list[tuple[str, str]]:
    """(kind, name) of each symbol that nm lists."""
    out = subprocess.run(["nm", *flags, str(path)], check=True, capture_output=True, text=True).stdout
    return [(kind, name) for line in out.splitlines() for *_, kind, name in [line.split()]]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_module_is_there_where_a_compiler_is():
    # Installation survives a failed build by design; the tests must not.
    assert cpu.unavailable() is None


@needs_module
@needs_nm
def test_only_torchs_stable_abi_is_used():
    undefined = symbols(Path(cpu.module.__file__), "-D", "--undefined-only")
    # libc, libstdc++ and libgcc version their symbols; torch and Python do not.
    unversioned = {name for kind, name in undefined if "@" not in name and kind == "U"}
    stable = {name for name in unversioned if re.match(r"(aoti_)?torch_", name)}
    assert stable
    # libtorch carries a copy of some of libstdc++'s functions, which the linker then takes for the definition.
    of_others = {name for name in unversioned if re.match(r"_?Py|_ZNK?St\d+__exception_ptr", name)}
    assert unversioned - stable - of_others == set()


@needs_module
@needs_nm
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_nothing_leaks_from_the_code_of_an_instruction_set(isa):
    """Else the linker may take an inline function from there for the whole program, on any processor."""
    tables = ("GatedDwconvKernels", "BlockKernels", "Conv3x3s2Kernels", "MatmulKernels", "HeadKernels", "PeakKernel",
              "ScanKernels")  # fmt: skip
    objects = list(ROOT.glob(f"build/temp*/CMakeFiles/*/csrc/cpu/kernels_{isa}.cpp.*"))
    if not objects:
        pytest.skip(f"no build tree with {isa}")
    for path in objects:
        defined = [name for kind, name in symbols(path, "--extern-only") if kind != "U"]
        for table in tables:  # C++ writes each name with its length before it
            start = f"_ZN16mambaout_kernels3cpu{len(table)}{table}{len(isa)}{isa}E"
            assert len([name for name in defined if name.startswith(start)]) == 1
        assert len(defined) == len(tables), defined


@needs_module
def test_the_stub_lists_what_the_module_has():
    stub = ast.parse((ROOT / "mambaout_kernels" / "_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert declared == {name for name in vars(cpu.module) if not name.startswith("__")}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
            bound = vars(getattr(cpu.module, node.name))
            assert methods == {name for name in bound if name == "__init__" or not name.startswith("_")}


@needs_module
def test_build_info():
    info = cpu.module.build_info()
    assert info["isas"][0] == "portable"
    assert set(cpu.module.supported_cpu_capabilities()) <= set(info["isas"])
    assert "fast-math" not in info["flags"]
    assert "-march" not in info["flags"]
    assert re.match(r"\d+\.\d+", info["torch_built_with"])


def test_cibuildwheel_installs_what_a_build_needs():
    """A shell reads it: torch>=2.10 without quotes would be torch, and its output written to a file called =2.10."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    words = list(shlex.shlex(settings["tool"]["cibuildwheel"]["before-build"], posix=True, punctuation_chars=True))
    assert words[:2] == ["pip", "install"]
    project = settings["project"]
    assert sorted(words[2:]) == sorted(project["dependencies"] + project["optional-dependencies"]["build"])


USE_AS_INSTALLED = """
import sys, warnings
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch, mambaout_kernels as m
assert m.__file__.startswith({library!r}), m.__file__
print("reason:", m.backends.status()["cpu"])
block = m.FusedGatedCNNBlock(16).double()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        block(torch.randn(1, 3, 3, 16, dtype=torch.float64)).sum().backward()
print("warnings:", [str(w.message) for w in caught])
"""


def test_without_a_compiler_it_installs_and_runs_on_the_reference(tmp_path):
    library = tmp_path / "lib"
    of_earlier_build = library / "mambaout_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    of_earlier_build.parent.mkdir(parents=True)
    of_earlier_build.touch()
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path), "--build-lib", str(library)]
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    assert build.stderr.count("WARNING: mambaout_kernels is being installed without its compiled CPU kernels") == 1
    assert not of_earlier_build.exists()
    for data in ("py.typed", "_C.pyi", "audit/shortfalls.json"):
        assert (library / "mambaout_kernels" / data).exists()

    environment = {**os.environ, "PYTHONPATH": str(library)}
    script = USE_AS_INSTALLED.format(library=str(library))
    use = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert use.returncode == 0, use.stderr
    reason, warnings = use.stdout.splitlines()[-2:]
    assert "pip install" in reason
    assert warnings.count("runs its PyTorch reference") == 1
