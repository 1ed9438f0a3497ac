"""Other runtimes beside ours: what they compute, on how many threads, and what is said where they cannot."""

import dataclasses
import json

import pytest
import torch

from mambaout_kernels.benchmarking import measure, peers, shapes, workloads
from mambaout_kernels.benchmarking.workloads import Cell
from mambaout_kernels.cli import main

CELL = Cell("model", "fwd", "fp32", 3, shapes.stages("test_mambaout")[0], ("eager", *peers.NAMES))


def needs(name):
    if name not in peers.installed():
        pytest.skip(peers.left_out())


def outputs(cell, folder):
    """Each contender's output, by its name; and the reasons of those that cannot."""
    workload = workloads.build(cell, folder)
    found = {}
    for contender in workload.contenders:
        with contender.context():
            found[contender.name] = contender.run(contender.prepare()).float().clone()
    return found, workload.failures


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_peer_computes_the_same(name, folder):
    needs(name)
    found, failures = outputs(dataclasses.replace(CELL, contenders=("eager", name)), folder)
    assert failures == {}
    torch.testing.assert_close(found[name], found["eager"], rtol=1e-4, atol=1e-4 * found["eager"].abs().max().item())


@pytest.mark.parametrize("name", peers.NAMES)
def test_of_a_block(name, folder):
    needs(name)
    shape = shapes.stages("test_mambaout", [4])[0]
    found, failures = outputs(Cell("block", "fwd", "fp32", 2, shape, ("eager", name)), folder)
    assert failures == {}
    torch.testing.assert_close(found[name], found["eager"], rtol=1e-4, atol=1e-4)


def test_bf16(folder):
    needs("onnxruntime")
    needs("openvino")
    found, failures = outputs(dataclasses.replace(CELL, dtype="bf16"), folder)
    assert failures.pop("onnxruntime") == "not available: ONNX Runtime has no bf16 kernels for the CPU"
    if "openvino" in failures:
        assert failures == {"openvino": "not available: OpenVINO computes no bf16 on this CPU"}
        return
    [fp32, _] = (outputs(dataclasses.replace(CELL, contenders=(each,)), folder)[0] for each in ("openvino", "eager"))
    difference = (found["openvino"] - fp32["openvino"]).abs().max() / fp32["openvino"].abs().max()
    assert 1e-4 < difference < 0.1  # it does compute in bf16


def test_one_export_serves_all(folder, monkeypatch):
    needs("onnxruntime")
    outputs(CELL, folder)
    monkeypatch.setattr("mambaout_kernels.integrations.export.to_onnx", lambda *_, **__: pytest.fail("exported again"))
    assert "onnxruntime" in outputs(dataclasses.replace(CELL, batch=1), folder)[0]


@pytest.mark.parametrize("name", peers.NAMES)
def test_a_wrong_peer_is_not_timed(name, monkeypatch, folder):
    needs(name)
    right = peers._BUILDERS[name]

    def wrong(*args):
        run = right(*args)
        return lambda: run() * 1.001

    monkeypatch.setitem(peers._BUILDERS, name, wrong)
    cell = dataclasses.replace(CELL, contenders=("eager", name))
    _, row = measure.time_cell(cell, 1, 0.001, measure.Watch(), {}, folder)
    assert "its output is wrong: y: mean error" in row["failure"]
    assert "median_s" not in row


def test_rows_of_peers(folder):
    needs("onnxruntime")
    cell = dataclasses.replace(CELL, contenders=("eager", "onnxruntime"))
    eager, row = measure.time_cell(cell, 1, 0.001, measure.Watch(), {"fp32": 1e12}, folder)
    assert row["backend"].startswith("ONNX Runtime 1.")
    assert row["speedup"] == eager["median_s"] / row["median_s"]
    assert row["peak_share"] == pytest.approx(row["flop_per_s"] / 1e12)


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_torchs(name, threads, folder, monkeypatch):
    needs(name)
    given = []
    monkeypatch.setitem(peers._BUILDERS, name, lambda path, x, dtype, count: given.append(count) or (lambda: x))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peers.build(name, lambda: folder, torch.zeros(1), "fp32")
    finally:
        torch.set_num_threads(before)
    assert given == [threads]


SMALL = ["bench", "model", "--variant", "test_mambaout", "--batch", "1", "--dtype", "fp32", "--threads", "1"]
SMALL += ["--budget", "0.001", "--no-naive", "--no-compile", "--no-memory", "--input", "random"]


@pytest.mark.usefixtures("forked_workers")
def test_what_is_missing_is_left_out_and_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in ("openvino", "onnxruntime") else object())
    assert peers.installed() == []
    assert main([*SMALL, "--no-stages", "--out", str(tmp_path), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert "ONNX Runtime and OpenVINO: pip install onnxruntime openvino, or mambaout-kernels[peers]" in out
    rows = json.loads((tmp_path / "model.json").read_text())["results"]
    assert {row["contender"] for row in rows} == {"fused", "modules", "eager"}


@pytest.mark.usefixtures("forked_workers")
def test_no_peers_says_nothing_of_them(capsys):
    assert main([*SMALL, "--no-stages", "--no-peers"]) == 0
    out = capsys.readouterr().out
    assert "ONNX" not in out
    assert "OpenVINO" not in out


def test_bench_model_has_it_all(capsys, tmp_path):
    for name in peers.NAMES:
        needs(name)
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    document = json.loads((tmp_path / "model.json").read_text())
    rows = document["results"]
    assert {row["contender"] for row in rows if row["subject"] == "model"} == {
        "fused",
        "modules",
        "eager",
        *peers.NAMES,
    }
    assert {row["part"] for row in rows if row["subject"] == "part"} >= {"stem", "stage 1", "downsample 4", "head"}
    assert "OpenVINO, ms" in out
    assert "the best other" in out
    assert "downsample 4" in out
    if document["machine"]["isa"] is not None:
        assert document["fma_peak_by_threads"]["1"]["fp32"] > 1e8
        assert "FMA peak measured in this run" in out
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    assert "openvino" in (tmp_path / "model.csv").read_text()
