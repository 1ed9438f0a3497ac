"""The selective scan's Triton kernels as compiled for GPUs that are not here: no spills; what their bound counts."""

import functools
import json
import os
from importlib.util import find_spec

import pytest

from mambaout_kernels import cli
from mambaout_kernels.comparators import scan_report
from mambaout_kernels.comparators.scan_report import VMAMBA_STAGE1, ScanKernel, ScanShape

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compiler"
)


@functools.cache
def compiled(name, target, dtype, S):
    return scan_report.compile_ahead(ScanKernel(name, target, dtype, 192, S))


def cases():
    """Two of each architecture in make test; all kernels, dtypes and widths of the state in make nightly."""
    often = {("scan_fwd", "sm_90", "bfloat16", 16), ("scan_bwd", "sm_90", "bfloat16", 16),
             ("scan_bwd", "sm_80", "bfloat16", 16), ("scan_fwd", "sm_80", "bfloat16", 1)}  # fmt: skip
    for target in ("sm_80", "sm_90"):
        for dtype in ("bfloat16", "float16", "float32"):
            for S in (1, 2, 3, 8, 16, 20, 64, 128, 256):
                for name in scan_report.KERNELS:
                    case = (name, target, dtype, S)
                    marks = () if case in often else pytest.mark.nightly
                    yield pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize("case", [pytest.param(p.values, marks=p.marks, id=p.id) for p in cases()])
def test_gates(case):
    found = compiled(*case)
    name, _, _, S = case
    assert found.failures == []
    assert found.resident_blocks > 0
    if name != "scan_bwd" and S <= 16:  # sums over states stay in a thread
        assert found.shared_bytes == 0


def test_what_a_segment_executes():
    """32 steps of 2 channels in a thread: a decay for each state, and softplus; backward of 1, forward again twice."""
    forward, backward = (compiled(name, "sm_90", "bfloat16", 16) for name in ("scan_fwd", "scan_bwd"))
    assert forward.executed["MUFU.EX2"] == 32 * 2 * (16 + 1)
    assert 32 * 2 * 17 - 2 * 17 <= backward.executed["MUFU.EX2"] <= 32 * 3 * 17


def test_the_bound_is_of_the_slowest_limit():
    found = compiled("scan_fwd", "sm_90", "bfloat16", 16)
    least = scan_report.bound(found, VMAMBA_STAGE1)
    assert least.microseconds == max(least.limits.values())
    tokens = 128 * 4 * 56 * 56
    moved = tokens * (2 * (192 / 4 + 192 + 16 + 16) + 4 * 192)
    assert least.limits["DRAM"] == pytest.approx(moved / 3.35e12 * 1e6)
    exponentials = tokens * 192 * 16
    assert least.limits["MUFU"] > exponentials / (16 * 132 * 1.755e9) * 1e6
    twice = scan_report.bound(found, ScanShape(256, 4, 56 * 56))
    assert twice.microseconds == pytest.approx(2 * least.microseconds, rel=0.05)
    assert scan_report.sum_of_scans(found.kernel, VMAMBA_STAGE1) == pytest.approx(
        128 * 3136 * 192 * (4 * 4 + 2) / 3.35e12 * 1e6
    )


def test_lines():
    (cells,) = scan_report.lines([compiled("scan_fwd", "sm_90", "bfloat16", 16)])
    assert len(cells) == len(scan_report.HEADINGS)
    assert cells[-1] == "pass"


def test_the_command_tells_of_it(monkeypatch, capsys):
    monkeypatch.setattr(scan_report, "KERNELS", ("chunk_ends",))
    arguments = ["audit", "--backend", "triton", "--target", "sm_90,gfx942", "--dtype", "bfloat16"]
    assert cli.main([*arguments, "--kernel", "selective_scan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["kernel"], each["S"], each["spills"]) for each in found] == [
        ("chunk_ends", s, "0") for s in ("16", "1")
    ]
