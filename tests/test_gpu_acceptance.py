"""benchmarks/gpu_acceptance.py without a GPU: the dry mode, and that a section's failure is not the report's."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mambaout_kernels import backends

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the CPU kernels are not built")


@pytest.fixture
def acceptance(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_acceptance

    yield gpu_acceptance
    for name in ("gpu_acceptance", "gpu_acceptance_report"):
        sys.modules.pop(name, None)


def dry(acceptance, out, *arguments):
    status = acceptance.main(["--dry", "--out", str(out), *arguments])
    return status, (out / "REPORT.md").read_text(), json.loads((out / "results.json").read_text())


def test_a_dry_run_measures_beside_predictions(acceptance, tmp_path, capsys):
    status, text, content = dry(acceptance, tmp_path, "--only", "op", "--only", "behaviour", "--only", "sanitizer")
    assert status == 0, text
    assert text in capsys.readouterr().out
    assert "# GPU acceptance (dry run on the CPU: no GPU time is in it)" in text
    for finding in (
        "backend cpu: usable",
        "cpu, a second run: the same bits",
        "compute-sanitizer: left out (a dry run)",
    ):
        assert f"- {finding}" in text
    timed = [row for row in content["results"] if row["contender"] == "fused"]
    assert [(row["mode"], row["label"]) for row in timed] == [("fwd", "7x7x576"), ("bwd", "7x7x576")]
    for row, predicted in zip(timed, content["predictions"], strict=True):
        elements = (3 if row["mode"] == "fwd" else 5) * row["height"] * row["width"] * row["hidden"]
        assert predicted["bytes / bandwidth"] == pytest.approx(4 * elements / content["bandwidth"] * 1e6)
        assert predicted["measured"] == row["min_s"] * 1e6
        assert predicted["machine code"] is None  # of the CUDA kernels alone
    pytest.importorskip("matplotlib")
    for image in ("predicted.png", "cpu.png"):
        assert f"({image})" in text
        assert (tmp_path / image).stat().st_size > 5000


def test_a_section_that_fails_is_a_finding(acceptance, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(acceptance, "copy_bandwidth", broken)
    monkeypatch.setattr(acceptance, "behaviour", broken)
    status, text, content = dry(acceptance, tmp_path, "--only", "behaviour", "--only", "op")
    assert status == 1
    assert "- **FAILED**: behaviour of cpu: RuntimeError: the driver is gone" in text
    assert "- **FAILED**: bandwidth: RuntimeError: the driver is gone" in text
    assert "- bandwidth of a copy: not measured" in text
    assert len(content["results"]) == 6
    assert all(entry["bytes / bandwidth"] is None for entry in content["predictions"])


def test_a_wrong_result_is_a_finding(acceptance, tmp_path, monkeypatch):
    module = backends.load("cpu")
    right = module.gated_dwconv
    monkeypatch.setattr(module, "gated_dwconv", lambda *a: right(*a) * 1.01)
    status, text, _ = dry(acceptance, tmp_path, "--only", "op")
    assert status == 1
    assert "**FAILED**: cpu: op fwd 7x7x576 fp32 batch 1: WRONG: y" in text


def test_nothing_is_begun_when_time_is_up(acceptance, tmp_path):
    status, text, content = dry(acceptance, tmp_path, "--only", "op", "--minutes", "0")
    assert status == 0
    assert content["results"] == []
    assert "## Left out\n\n- cpu: op fwd 7x7x576 fp32 batch 1" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_dry(acceptance, tmp_path, capsys):
    with pytest.raises(SystemExit):
        acceptance.main(["--out", str(tmp_path)])
    assert "torch sees no CUDA device; --dry runs the same steps on the CPU" in capsys.readouterr().err
