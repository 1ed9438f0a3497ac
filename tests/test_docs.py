"""Examples in the documentation run, its links and paths lead somewhere, and what is public is documented."""

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest
from processes import python

import mambaout_kernels as mk

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(mk.__path__, "mambaout_kernels.") if not re.search(r"_C|__main__", m.name)
)


def examples(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda page: page.name)
def test_examples_run(page, tmp_path):
    """All of a page as one program, as a reader would paste them."""
    done = subprocess.run([python(), "-c", examples(page)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"needs an optional package: {error}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [n for n in mk.__all__ if callable(getattr(mk, n))])
def test_what_is_public_is_documented(name):
    text = inspect.getdoc(getattr(mk, name)) or ""
    assert len(text.splitlines()) > 1 or len(text) > 60, name


REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def resolve(path: str) -> object:
    """The object of a dotted path, the longest part of which is a module."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[count:], found)
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("entry", REFERENCE.split("\n::: ")[1:], ids=lambda entry: entry.split()[0])
def test_what_the_api_reference_names_is_there(entry):
    """Its members too, which the site would leave out in silence."""
    try:
        found = resolve(entry.split()[0])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mambaout_kernels"):
            raise
        pytest.skip(f"needs an optional package: {error}")
    if members := re.search(r"members:\s*\[([\w, ]*)\]|members:\n((?: +- \w+\n)+)", entry):
        for name in re.findall(r"\w+", members[1] or members[2]):
            assert hasattr(found, name), name


def test_the_api_reference_names_what_is_public():
    for name in set(mk.__all__) - {"__version__"}:
        if inspect.ismodule(getattr(mk, name)):
            assert f"\n::: mambaout_kernels.{name}." in REFERENCE, name
        else:
            assert re.search(rf"mambaout_kernels\.{name}\b", REFERENCE), name


# Paths such as `csrc/cpu/gemm/`, of files and folders that the repository has; results and builds come and go.
TRACKED = ("csrc", "mambaout_kernels", "tests", "benchmarks", "examples", "docs", "\\.ci", "\\.github")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{'|'.join(TRACKED)})/[\w./*-]*)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert "".join(target) in targets, target


def test_the_map_names_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sources = [path for top in ("csrc", "mambaout_kernels") for path in (ROOT / top).rglob("*") if path.is_file()]
    folders = {path.parent.relative_to(ROOT) for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")}
    for folder in folders:  # itself, or the folder below csrc or mambaout_kernels that it is in
        named = [f"`{path.as_posix()}/`" in text for path in (folder, *folder.parents)]
        assert any(named[:-2]) or len(folder.parts) == 1, folder
