"""An installation by pip where nothing can be compiled works, on the reference, and says once what is missing.

For make nightly; make test has a build without a compiler (test_build.py).
"""

import os
import shutil
import sys
import sysconfig
import zipfile

import pytest
from installing import ROOT, copy_sources, create_environment, install, run

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="takes the files that git has"),
    pytest.mark.skipif(sys.platform == "win32", reason="its compilers are not found through the PATH"),
]

# what can be run -> what the build says, what `info` says
SITUATIONS = {
    "no compiler": (("cmake", "ninja"), "`cmake -S ...` failed", "a C++20 compiler"),
    "broken compiler": (("cmake", "ninja", "c++"), "`cmake -S ...` failed", "from the sources"),
    "no CMake": (("c++",), "cmake is not installed", "pip install cmake"),
}
USE = """
import warnings, torch, mambaout_kernels as mk
block = mk.FusedGatedCNNBlock(16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        block(torch.randn(1, 5, 5, 16)).sum().backward()
print([str(w.message) for w in caught if "mambaout" in str(w.message)])
"""


@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_installs_as_pure_python(situation, tmp_path):
    programs, reason, hint = SITUATIONS[situation]
    tools, tree, wheels = (tmp_path / name for name in ("tools", "tree", "wheels"))
    tools.mkdir()
    for name in programs:
        if name == "c++":
            (tools / name).write_text("#!/bin/sh\nexit 1\n")
            (tools / name).chmod(0o755)
        elif shutil.which(name) is None:
            pytest.skip(f"no {name}")
        else:
            (tools / name).symlink_to(shutil.which(name))
    copy_sources(tree)
    library = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"  # setuptools' own place
    stale = tree / "build" / library / "mambaout_kernels" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    before = sorted(tree.rglob("*"))
    python, packages = create_environment(tmp_path / "env")
    surroundings = {"PATH": str(tools), "PYTHONPATH": ""}
    for variable in ("CC", "CXX"):
        if variable in os.environ:
            surroundings[variable] = str(tools / "c++")

    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", wheels, tree]
    said = run(*command, cwd=tmp_path, **surroundings)
    assert said.count("WARNING: mambaout_kernels is being installed without its compiled CPU kernels") == 1
    assert reason in said
    assert sorted(tree.rglob("*")) == before
    [wheel] = wheels.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"mambaout_kernels/ops/gated_dwconv.py", "mambaout_kernels/py.typed", "mambaout_kernels/_C.pyi"} <= set(
        names
    )
    assert not [name for name in names if name.endswith((".so", "stale.py"))]

    install(wheel, packages)
    info = run(python, "-m", "mambaout_kernels", "info", cwd=tmp_path, **surroundings)
    [to_get] = [line for line in info.splitlines() if line.startswith("to get the compiled kernels")]
    assert hint in to_get
    assert ("a C++20 compiler" in to_get) == (situation == "no compiler")
    assert "No module named 'mambaout_kernels._C'" in info
    assert run(python, "-c", USE, cwd=tmp_path, **surroundings).count("runs its PyTorch reference") == 1
    check = [python, "-m", "mambaout_kernels", "check", "--variant", "test_mambaout", "--dtype", "fp32"]
    assert "comparisons passed" in run(*check, cwd=tmp_path, **surroundings)
