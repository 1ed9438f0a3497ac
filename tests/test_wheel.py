"""A source distribution, a wheel from it, and what of it runs without the source tree. Minutes: `make nightly`."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from mambaout_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="takes the files that git has"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
]


def run(*command, cwd, **environment):
    """Without nvcc: this is about the package, and the CUDA kernels take minutes more."""
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, "PATH": path, **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The files that git has, as they are now."""
    copy = tmp_path_factory.mktemp("tree")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, folder, cwd=tree)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    return next(folder.glob("*.whl"))


def test_source_distribution_has_sources_and_no_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CMakeLists.txt", "csrc/cpu/dispatch.cpp", "csrc/cuda/forward.cu", "mambaout_kernels/ops.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith("build/")]


def test_wheel_has_the_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"mambaout_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"mambaout_kernels/py.typed", "mambaout_kernels/benchmarking/shapes.json"} <= set(names)
    assert all(name.startswith(("mambaout_kernels/", "mambaout_kernels-")) for name in names)


def test_installed_wheel_checks_itself_without_the_sources(wheel, tmp_path):
    """In an environment of its own, which sees this one's torch but not this one's package."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", packages, wheel, cwd=tmp_path)
    (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("purelib"))
    command = [python, "-m", "mambaout_kernels", "check", "--variant", "test_mambaout", "--dtype", "fp32,bf16"]
    out = run(*command, cwd=tmp_path, PYTHONPATH="")
    assert "cpu (portable)" in out
    assert "comparisons passed" in out
