"""Examples in the documentation run, its links lead somewhere, and what is public is documented."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    done = subprocess.run(
        [sys.executable, "-c", examples(page)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
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
