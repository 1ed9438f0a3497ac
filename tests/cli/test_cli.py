"""The command line, run as a user runs it: what it prints, what it writes, and how it refuses."""

import csv
import itertools
import json
import sys
from dataclasses import replace

import pytest
import torch

import mambaout_kernels as mk
from mambaout_kernels import backends, reference
from mambaout_kernels.backends import cpu
from mambaout_kernels.cli import check, main, special_values, terminal
from mambaout_kernels.cli.check import OUTPUTS

SMALL = ["--variant", "test_mambaout", "--stage", "4", "--batch", "1", "--dtype", "fp32", "--threads", "1"]
QUICK = ["--budget", "0.001", "--no-naive"]


def run(capsys, *argv):
    """(exit status, stdout, stderr)."""
    try:
        status = main(argv)
    except SystemExit as error:  # argparse's own
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version(capsys):
    status, out, _ = run(capsys, "--version")
    assert (status, out.strip()) == (0, f"mambaout-kernels {mk.__version__}")


def test_info_tells_of_every_backend(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for name, reason in backends.status().items():
        assert f"{name} " in out
        assert ("ready" if reason is None else reason) in out
    assert torch.__version__ in out


def test_info_json(capsys):
    status, out, _ = run(capsys, "info", "--json")
    content = json.loads(out)
    assert status == 0
    assert content["backends"]["reference"] == {"usable": True, "reason": None}
    assert content["versions"]["torch"] == torch.__version__


def test_info_says_how_to_get_what_is_missing(capsys, monkeypatch):
    from mambaout_kernels.cli import info

    found = info._version
    monkeypatch.setattr(info, "_version", lambda package: None if package == "timm" else found(package))
    _, out, _ = run(capsys, "info")
    assert "to get timm: pip install mambaout-kernels[cli]" in out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check_passes(capsys, dtype):
    status, out, _ = run(capsys, "check", "--variant", "test_mambaout", "--dtype", dtype)
    assert status == 0
    assert "reference" in out
    assert "comparisons passed" in out
    assert "FAILED" not in out


def test_check_finds_a_wrong_kernel(capsys, monkeypatch):
    right = backends.load("reference").gated_dwconv
    monkeypatch.setattr(backends.load("reference"), "gated_dwconv", lambda *args: right(*args) * 1.01)
    status, out, _ = run(capsys, "check", "--variant", "test_mambaout", "--dtype", "fp64", "--backend", "reference")
    assert status == 1
    assert "FAILED" in out


def test_check_survives_a_kernel_that_raises(capsys, monkeypatch):
    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(backends.load("reference"), "gated_dwconv_backward", broken)
    command = ["check", "--variant", "test_mambaout", "--dtype", "fp32", "--backend", "reference"]
    status, out, _ = run(capsys, *command)
    assert status == 1
    assert "planted" in out


def test_check_json_has_every_output(capsys):
    command = ["check", "--variant", "test_mambaout", "--dtype", "fp32", "--backend", "reference", "--json"]
    status, out, _ = run(capsys, *command)
    content = json.loads(out)
    assert status == 0
    assert set(OUTPUTS) <= {name for name in OUTPUTS if name in json.dumps(content)}


@pytest.mark.skipif(cpu.module is None, reason="the compiled module is not there")
def test_check_runs_every_instruction_set(capsys):
    before = cpu.module.cpu_capability()
    _, out, _ = run(capsys, "check", "--variant", "test_mambaout", "--dtype", "fp32", "--backend", "cpu")
    for isa in cpu.module.supported_cpu_capabilities():
        assert f"cpu ({isa})" in out
    assert cpu.module.cpu_capability() == before


def test_check_refuses_a_backend_that_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(backends.load("cuda"), "unavailable", lambda: "no such card")
    status, _, err = run(capsys, "check", "--backend", "cuda")
    assert status == 2
    assert "no such card" in err


@pytest.mark.usefixtures("forked_workers")
def test_bench_writes_what_it_measured(capsys, tmp_path):
    status, out, _ = run(capsys, "bench", "op", *SMALL, *QUICK, "--out", str(tmp_path))
    assert status == 0
    assert "eager partial" in out
    document = json.loads((tmp_path / "op.json").read_text())
    rows = document["results"]
    assert {(row["contender"], row["mode"]) for row in rows} == {
        (c, m) for c in ("fused", "eager") for m in ("fwd", "bwd")
    }
    for row in rows:
        assert 0 < row["min_s"] <= row["median_s"]
        assert (row["threads"], row["dtype"], row["batch"]) == (1, "fp32", 1)
    assert all(row["check"] for row in rows if row["contender"] == "fused")
    assert document["machine"]["torch"] == torch.__version__
    with (tmp_path / "op.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def test_bench_block_measures_memory(capsys, tmp_path):
    command = ["bench", "block", *SMALL, *QUICK, "--mode", "train", "--out", str(tmp_path), "--no-plot"]
    assert run(capsys, *command)[0] == 0
    document = json.loads((tmp_path / "block.json").read_text())
    [fused] = [row for row in document["results"] if row["mode"] == "memory" and row["contender"] == "fused"]
    assert fused["kept_bytes"] > 0
    if backends.status()["cpu"] is None:
        assert fused["kept_ratio"] < 0.7
    assert not (tmp_path / "block.png").exists()


@pytest.mark.usefixtures("forked_workers")
def test_bench_model_on_photographs(capsys):
    command = ["bench", "model", "--variant", "test_mambaout", "--batch", "2", "--dtype", "fp32", "--threads", "1"]
    status, out, _ = run(capsys, *command, *QUICK, "--no-compile", "--no-peers", "--no-memory")
    assert status == 0
    assert "images per second" in out


@pytest.mark.usefixtures("forked_workers")
def test_bench_overhead(capsys):
    if backends.status()["cpu"] is not None:
        pytest.skip("the compiled module is not there")
    status, out, _ = run(capsys, "bench", "overhead", "--budget", "0.001")
    assert status == 0
    assert "difference" in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["bench", "op", "--stage", "7"], "stage must be in 1 to 4; got 7"),
        (["bench", "op", "--dtype", "int8"], "'int8' is not one of fp32"),
        (["bench", "op", "--batch", "0"], "'0' is not a positive integer"),
        (["bench", "op", "--budget", "-1"], "'-1' is not a positive number of seconds"),
        (["bench", "op", "--threads", "4096"], "--threads 4096: this process may use"),
        (["bench", "block", "--variant", "mambaout_huge"], "'mambaout_huge' is not one of mambaout_tiny"),
        (["bench", "op", "--out", "/dev/null/x"], "--out /dev/null/x"),
        (["bench", "latency", "--concurrency", "0"], "argument --concurrency: '0' is not a positive integer"),
        (["bench", "latency", "--concurrency", "1,65"], "--concurrency 65: at most 64 clients"),
        (["bench", "latency", "--threads", "4096"], "--threads 4096: this process may use"),
        (["bench", "latency", "--dtype", "int8"], "argument --dtype: 'int8' is not one of fp32"),
        (["bench", "latency", "--budget", "nan"], "'nan' is not a positive number of seconds"),
        (["bench", "latency", "--requests", "-5"], "argument --requests: '-5' is not a positive integer"),
        (["bench", "latency", "--batch", "100000000"], "--batch 100000000: u of"),
        (["bench", "latency", "--out", "/dev/null/x"], "--out /dev/null/x"),
        (["bench"], "required: WHAT"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["check", "--dtype", "fp8"], "'fp8' is not one of"),
        (["classify", "x.png", "--model", "resnet50", "--weights", "w"], "'resnet50' is not one of mambaout_femto"),
        (["classify", "x.png"], "IMAGE x.png does not exist, or is no file or folder"),
        (["classify", __file__, "--size", "4096"], "--size must be at most 2048, got 4096"),
        (["classify", __file__, "--model", "mambaout_tiny.in2k"], "'mambaout_tiny.in2k' is not one of mambaout_femto"),
        (["classify", __file__, "--weights", "no.safetensors"], "no.safetensors does not exist"),
    ],
)
def test_refuses_by_name(capsys, argv, said):
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert said in err
    assert "Traceback" not in err


def test_cuda_is_refused_where_there_is_none(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    status, _, err = run(capsys, "bench", "op", *SMALL, "--device", "cuda")
    assert status == 2
    assert "PyTorch finds no CUDA device" in err
    status, _, err = run(capsys, "bench", "op", "--device", "cpu", "--graph")
    assert status == 2
    assert "--graph: CUDA graphs are of work on a CUDA device" in err
    status, _, err = run(capsys, "bench", "op", "--also", "tensorrt")
    assert status == 2
    assert "cudnn-benchmark" in err


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    status, _, err = run(capsys, "bench", "main")
    assert status == 2
    assert "pip install scikit-image, or mambaout-kernels[bench]" in err


def test_numbers_stay_whole_on_a_narrow_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    numbers = [f"{index}.{index}34e-05 / {index}.8" for index in range(8)]
    terminal.show_table("a title", ["a heading of several words"] * 9, [[*numbers, "a sentence " * 8]])
    out = capsys.readouterr().out
    assert all(number in out for number in numbers)
    assert out.count("sentence") == 8


def test_tables_without_rich(capsys, monkeypatch):
    from mambaout_kernels.cli import terminal

    monkeypatch.setattr(terminal, "_rich", lambda: False)
    terminal.show_table("title", ["a", "bb"], [["1", "2"], ["333", "4"]])
    assert capsys.readouterr().out.splitlines() == ["", "title", "a    bb", "1    2", "333  4"]


def test_interrupt_is_not_a_traceback(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    from mambaout_kernels.cli import info

    monkeypatch.setattr(info, "collect", interrupted)
    status, _, err = run(capsys, "info")
    assert (status, err) == (130, "interrupted\n")


def test_check_full_reports_stages_and_special_values(capsys, monkeypatch):
    cases = check.find_cases
    monkeypatch.setattr(check, "find_cases", lambda variant, dtypes, full: cases(variant, dtypes, False))
    command = ["check", "--full", "--variant", "test_mambaout", "--dtype", "fp32", "--backend", "reference"]
    status, out, _ = run(capsys, *command)
    assert status == 0
    for words in ("mean error / eager's", "special values", *special_values.KINDS):
        assert words in out
    content = json.loads(run(capsys, *command, "--json")[1])
    assert {(v["kind"], v["place"], v["act"]) for v in content["special_values"]} == set(
        itertools.product(special_values.KINDS, special_values.PLACES, reference.ACTIVATIONS)
    )


def test_check_full_runs_no_case_twice():
    cases = [replace(case, label="") for case in check.find_cases("mambaout_tiny", ["fp32"], full=True)]
    assert len(set(cases)) == len(cases)


def test_special_values_that_go_wrong_are_failures():
    eager = torch.tensor([torch.inf, 1e30, -1.0])

    def judged(*ours):
        return special_values.judge(torch.tensor(ours), eager, eager.double(), False)

    assert judged(torch.inf, 1e30, -1.0) == "as eager"
    for wrong in ((3e38, 1e30, -1.0), (torch.inf, torch.inf, -1.0), (torch.inf, 1.01e30, -1.0), (torch.inf, 1e30, 1.0)):
        assert judged(*wrong).startswith("FAILED")
    zero, minus = torch.tensor([0.0]), torch.tensor([-0.0])
    assert special_values.judge(zero, minus, minus.double(), True) == "the sign of a zero differs"
    # Where fp64 itself is NaN: to be expected of NaN, while of finite inputs it is eager that overflowed.
    nan, one = torch.tensor([torch.nan]).double(), torch.tensor([1.0]).double()
    assert special_values.judge(one, nan, nan, False).startswith("FAILED")
    assert special_values.judge(one, nan, nan, False, of_finite=True) == "finite, eager overflows"
    assert special_values.judge(nan, one, one, False, of_finite=True).startswith("FAILED")
    assert special_values.judge(one, one / 0, one / 0, False, of_finite=True).startswith("FAILED")
