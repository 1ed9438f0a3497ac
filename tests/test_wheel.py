"""A source distribution, a wheel from it, and what of it runs without the source tree. Minutes: `make nightly`."""

import sys
import sysconfig
import tarfile
import zipfile

import pytest
from installing import ROOT, copy_sources, create_environment, install, run

from mambaout_kernels.backends import cpu

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="takes the files that git has"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    copy = tmp_path_factory.mktemp("tree")
    copy_sources(copy)
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
    sources = {"csrc/cpu/gated_dwconv/dispatch.cpp", "csrc/cuda/forward.cu", "mambaout_kernels/ops/gated_dwconv.py"}
    assert {"CMakeLists.txt", *sources} <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith("build/")]


def test_wheel_has_the_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert f"mambaout_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert {"mambaout_kernels/py.typed", "mambaout_kernels/audit/shortfalls.json"} <= set(names)
    assert all(name.startswith(("mambaout_kernels/", "mambaout_kernels-")) for name in names)


def test_installed_wheel_checks_itself_without_the_sources(wheel, tmp_path):
    """In an environment of its own, which sees this one's torch but not this one's package."""
    python, packages = create_environment(tmp_path / "env")
    install(wheel, packages)
    command = [python, "-m", "mambaout_kernels", "check", "--variant", "test_mambaout", "--dtype", "fp32,bf16"]
    out = run(*command, cwd=tmp_path, PYTHONPATH="")
    assert "cpu (portable)" in out
    assert "comparisons passed" in out
