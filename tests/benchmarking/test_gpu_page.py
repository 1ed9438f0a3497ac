"""The page about a card says what was measured on it."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("gpu_page", ROOT / "benchmarks" / "gpu_page.py")
gpu_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu_page)

MEASURED = sorted((ROOT / "benchmarks" / "measured").glob("*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_page_is_that_of_the_file(path):
    measured = json.loads(path.read_text(encoding="utf-8"))
    assert (ROOT / "docs" / f"{path.stem}.md").read_text(encoding="utf-8") == gpu_page.page(measured, path.stem)
    assert all(row["commit"] for row in measured["rows"])


def row(contender, seconds, commit="a", **other):
    return {
        "subject": "model", "mode": "fwd", "dtype": "bf16", "autocast": False, "graph": False, "batch": 128,
        "label": "mambaout_tiny", "contender": contender, "min_s": seconds, "commit": commit, **other,
    }  # fmt: skip


def test_ratios_are_of_one_run():
    rows = [row("timm-compile", 0.02), row("fused", 0.01), row("fused", 0.005, "b"), row("fused", 0.001, graph=True)]
    first, second = gpu_page.model_table(rows).splitlines()[2:]
    assert first.split(" | ")[4] == "a"
    assert first.endswith("| 2.00 |")
    assert second.endswith("|  |")


def test_the_share_of_the_bandwidth():
    """256 hidden channels of 56 x 56 pixels, read twice and written once: 1.23 GB at batch 1000 in 16 bits."""
    op = row("cuda", 1e-3, subject="op", label="56x56x96", batch=1000, variant="mambaout_tiny")
    assert gpu_page.share(op, 3 * 256 * 56 * 56 * 1000 * 2 / 1e-3) == pytest.approx(1.0)
    assert gpu_page.variant_of(row("cuda", 1.0, label="56x56x128"))["variant"] == "mambaout_base"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(name, 0.01) for name in gpu_page.MODEL_CONTENDERS]
    rows += [row(name, 0.01, subject="op", label="56x56x96") for name in gpu_page.OP_CONTENDERS]
    gpu_page.draw(rows, tmp_path / "plots", "card")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"card-models.svg", "card-op.svg"}
