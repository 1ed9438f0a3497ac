"""benchmarks/gpu_acceptance.py without a GPU: its sections on the CPU, each a process; what is made of crashes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import python

from mambaout_kernels import backends

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("gpu_acceptance", "gpu_sections", "gpu_acceptance_report", "gpu_counters", "gpu_behaviour", "gpu_kernels",
           "gpu_scan")  # fmt: skip
pytestmark = pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the CPU kernels are not built")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


def dry(out, *arguments):
    """(exit status, the report, the records) of a run in a process of its own."""
    command = [python(), str(BENCHMARKS / "gpu_acceptance.py"), "--dry", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return done.returncode, (out / "REPORT.md").read_text(), records


def only(*names):
    return [word for name in names for word in ("--only", name)]


def test_the_scan_and_the_mixers(tmp_path):
    status, text, records = dry(tmp_path, *only("scan-bf16", "mixers"))
    assert status == 0, text
    notes = [record["text"] for record in records if record["kind"] == "note"]
    assert sum("the worst of 8 results" in note for note in notes) == 8
    assert sum("states: " in note and "minimum / median" in note for note in notes) == 4
    assert any(note.startswith("mixer cross-scan, fp32, D = 32, 256 tokens: ") for note in notes)
    assert "attention is slower from so many tokens on, D = 32: gated-conv" in text


def test_sections_and_their_report(tmp_path):
    status, text, records = dry(
        tmp_path, *only("facts", "bandwidth", "op-bf16", "memcheck", "counters"), "--commit", "abc"
    )
    assert status == 0, text
    assert "# GPU acceptance (dry run on the CPU: no GPU time is in it)" in text
    assert "- commit: abc" in text
    assert "- memcheck: compute-sanitizer memcheck: a dry run" in text
    rows = [r for r in records if r["section"] == "op-bf16" and r["kind"] == "row"]
    assert [(r["mode"], r["contender"]) for r in rows] == [
        (mode, name) for mode in ("fwd", "bwd") for name in ("fused", "eager", "naive")
    ]
    [bandwidth] = [r["bandwidth"] for r in records if "bandwidth" in r]
    for row in rows[::3]:
        assert row["check"]
        elements = (3 if row["mode"] == "fwd" else 5) * row["height"] * row["width"] * row["hidden"]
        predicted = f"| {row['mode']} | 5x5x64 | 1 | bf16 | {2 * elements / bandwidth * 1e6:.1f} |  | "
        assert predicted + f"{row['min_s'] * 1e6:.1f}" in text
    assert len(list(tmp_path.iterdir())) <= 8
    pytest.importorskip("matplotlib")
    for image in ("predicted.png", "op.png"):
        assert f"({image})" in text
        assert (tmp_path / image).stat().st_size > 5000


def test_every_section_of_the_plans_is_there_and_fits_the_time(load):
    sections = load("gpu_sections")
    for plan in sections.PLANS.values():
        assert set(plan) - {sections.WAIT} <= set(sections.SECTIONS)
        assert plan[:2] == ("facts", "build")
    assert {name for plan in sections.PLANS.values() for name in plan} == {*sections.SECTIONS, sections.WAIT}
    for plan in sections.PLANS.values():  # nothing is timed while others run
        for at, name in enumerate(plan):
            if name.startswith(("model", "block", "op", "bandwidth")):
                beside = [
                    earlier for earlier in plan[:at] if earlier != sections.WAIT and sections.SECTIONS[earlier].beside
                ]
                assert not beside or sections.WAIT in plan[plan.index(beside[-1]) : at]
    plan_a = sections.PLANS["A"]
    first_to_wait_for = next(name for name in plan_a if name.startswith("check") and not sections.SECTIONS[name].beside)
    assert first_to_wait_for == "check-cuda-bf16"


class Sections:
    """Stand-ins for the sections, in a folder of their own beside copies of the scripts."""

    TEXT = """
import os, time
from gpu_sections_real import *
from gpu_sections_real import Section

def good(settings):
    yield "note", {"text": "good"}

def raises(settings):
    yield "note", {"text": "before"}
    raise RuntimeError("the driver is gone")

def crashes(settings):
    yield "note", {"text": "before the crash"}
    os.kill(os.getpid(), 11)

def hangs(settings):
    yield "note", {"text": "before the wait"}
    time.sleep(600)

def slow(settings):
    time.sleep(2)
    yield "note", {"text": "slow"}

def quick(settings):
    yield "note", {"text": "quick"}

SECTIONS = {"slow": Section(slow, 60, True), "quick": Section(quick, 60), "good": Section(good, 60),
            "raises": Section(raises, 60), "crashes": Section(crashes, 60), "hangs": Section(hangs, 5)}
PLANS = {"A": ("good",)}
"""

    def __init__(self, folder):
        (folder / "benchmarks").mkdir()
        for path in BENCHMARKS.glob("gpu_*.py"):
            name = "gpu_sections_real.py" if path.stem == "gpu_sections" else path.name
            (folder / "benchmarks" / name).write_text(path.read_text().replace("LEAST_S = 10.0", "LEAST_S = 1.0"))
        (folder / "benchmarks" / "gpu_sections.py").write_text(self.TEXT)
        self.script, self.out = folder / "benchmarks" / "gpu_acceptance.py", folder / "out"

    def run(self, *arguments):
        environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
        command = [python(), str(self.script), "--dry", "--out", str(self.out), *arguments]
        status = subprocess.run(command, env=environment, capture_output=True, text=True).returncode
        return status, (self.out / "REPORT.md").read_text()


def test_what_a_section_found_before_it_failed_stays(tmp_path):
    status, text = Sections(tmp_path).run(*only("raises", "crashes", "hangs", "good"))
    assert status == 1
    for finding in ("raises: before", "crashes: before the crash", "hangs: before the wait", "good: good"):
        assert f"- {finding}" in text
    assert "- **FAILED** raises: RuntimeError: the driver is gone" in text
    assert "- **FAILED** crashes: ended with status -11" in text
    assert "- hangs: ended at its limit of 5 s" in text


@pytest.mark.parametrize("names", [("slow", "quick"), ("slow", "wait", "quick")], ids=" ".join)
def test_sections_beside_others_are_waited_for(tmp_path, names):
    script = Sections(tmp_path).script
    program = (
        f"import sys, time; sys.path.insert(0, {str(script.parent)!r}); import gpu_acceptance as g; "
        f"from gpu_sections import Settings; from pathlib import Path; "
        f"g.run({names!r}, Settings(Path({str(tmp_path)!r}), 'v', False, time.time() + 60))"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    subprocess.run([python(), "-c", program], env=environment, check=True)
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = [record["section"] for record in records if record["kind"] == "note"]
    assert found == (["slow", "quick"] if "wait" in names else ["quick", "slow"])


def test_nothing_is_begun_when_time_is_up(tmp_path):
    status, text = Sections(tmp_path).run("--minutes", "0.01")
    assert status == 0
    assert "- good: no time" in text


def test_a_wrong_result_or_one_of_ours_that_did_not_run_is_a_failure(load, tmp_path):
    report = load("gpu_acceptance_report")
    common = {"kind": "row", "section": "op", "subject": "op", "mode": "fwd", "variant": "v", "label": "7x7x8"}
    common |= {"batch": 1, "dtype": "bf16", "autocast": False, "graph": False, "threads": 1, "height": 7, "width": 7}
    common |= {"hidden": 16, "conv_channels": 8, "kernel_size": 7}
    timed = {"min_s": 2e-6, "median_s": 3e-6, "speedup": 1.0, "backend": "x"}
    wrong = {"check": False, "check_name": "y", "check_error": 1.0, "check_excess": 7.0}
    records = [
        {**common, **timed, **wrong, "contender": "cuda"},
        {**common, "contender": "triton", "backend": "triton", "failure": "RuntimeError: no kernel image"},
        {**common, **timed, "contender": "eager", "median_s": 2e-6},
        {**common, "contender": "compile", "backend": "PyTorch", "failure": "it may fail"},
    ]
    lines = [json.dumps(record) for record in records]
    (tmp_path / "results.jsonl").write_text("\n".join([*lines, lines[0][:50]]))  # the last cut off by a kill
    failed = report.write(tmp_path)
    assert len(failed) == 2
    assert "CUDA C++: WRONG: y" in failed[0]
    assert "Triton: RuntimeError: no kernel image" in failed[1]
    assert "op fwd v 7x7x8, bf16, batch 1: eager partial by 1.50x" in (tmp_path / "REPORT.md").read_text()


NCU = """program output, first
==PROF== Connected to process 7 (/usr/bin/python3.12)
==PROF== Profiling "conv_branch_fwd" - 0: 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3.12","127.0.0.1","void mambaout_kernels::cuda::<unnamed>::conv_branch_fwd<float, (int)7>(Args<float>, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","215,616"
"0","7","python3.12","127.0.0.1","void mambaout_kernels::cuda::<unnamed>::conv_branch_fwd<float, (int)7>(Args<float>, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","1,234,567,890"
"0","7","python3.12","127.0.0.1","void mambaout_kernels::cuda::<unnamed>::conv_branch_fwd<float, (int)7>(Args<float>, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.25"
"0","7","python3.12","127.0.0.1","void mambaout_kernels::cuda::<unnamed>::conv_branch_fwd<float, (int)7>(Args<float>, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","","5.5"
"1","7","python3.12","127.0.0.1","sum_partials(float const*, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","gpu__time_duration.sum","nsecond","3,000"
"1","7","python3.12","127.0.0.1","sum_partials(float const*, int)","1","7","(256, 1, 1)","(1024, 1, 1)","0","9.0","Command line profiler metrics","dram__bytes.sum","byte","n/a"
"""  # noqa: E501


def test_hardware_counters(load):
    counters, report = load("gpu_counters"), load("gpu_acceptance_report")
    first, second = counters.parse(NCU)
    assert first["kernel"] == "conv_branch_fwd"
    assert first["seconds"] == pytest.approx(215.616e-6)
    assert (first["dram_bytes"], first["dram_percent"]) == (1234567890.0, 91.25)
    assert first["stalls"] == {"long_scoreboard": 5.5}
    assert second == {"kernel": "sum_partials", "stalls": {}, "seconds": pytest.approx(3e-6)}
    assert counters.parse("==ERROR== ncu has no permission") == []
    _, [line, other] = report.counters_table([{"stage": 1, **first}, {"stage": 1, **second}])
    assert line == ["1", "conv_branch_fwd", "215.6", "1.235", "91 %", "", "", "", "long scoreboard 5.5"]
    assert other[:4] == ["1", "sum_partials", "3.0", ""]
    command = counters.command("ncu", 2)
    assert command[-1] == "2"
    assert "--clock-control" in command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_of_a_run(load):
    kernels, report = load("gpu_kernels"), load("gpu_acceptance_report")
    on_gpu, on_host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, us, device=on_gpu):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us))

    events = [event("product", 30.0), event("norm", 6.0), event("norm", 6.0), event("norm", 6.0)]
    events += [event("aten::mm", 500.0, on_host), event("## compiled ##", 900.0), event("Torch-Compiled Region", 900.0)]
    found = kernels.summed(events)
    assert found == {"total_us": 48.0 / kernels.RUNS, "kernels": [(10.0, 1 / 3, "product"), (6.0, 1.0, "norm")]}
    what = {"subject": "model", "mode": "train", "label": "mambaout_tiny", "contender": "compile-fused"}
    _, lines = report.kernels_table([{**what, **found}], most=1)
    assert lines == [
        ["model train mambaout_tiny, torch.compile of fused", "16", "", "all"], ["", "10", "0.333333", "product"]
    ]  # fmt: skip


def test_without_a_gpu_only_dry(load, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load("gpu_acceptance").main(["--out", str(tmp_path)])
    assert "torch sees no CUDA device; --dry runs the same sections on the CPU" in capsys.readouterr().err
