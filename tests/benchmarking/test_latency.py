"""Latency under load and cold starts: percentiles, who works at the same time, in what order, and what rows tell."""

import dataclasses
import itertools
import json
import threading
from functools import partial

import pytest
import torch

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import (
    cold_start,
    latency,
    measure,
    peers,
    plot_latency,
    report,
    report_latency,
    shapes,
    workloads,
)
from mambaout_kernels.benchmarking.latency import Load, drive, percentile, serving, share, take_turns
from mambaout_kernels.benchmarking.timing import Contender
from mambaout_kernels.benchmarking.worker import Job
from mambaout_kernels.benchmarking.workloads import Cell
from mambaout_kernels.cli import main

CELL = Cell("model", "fwd", "fp32", 1, shapes.stages("test_mambaout")[0], latency.CONTENDERS)


def test_percentiles():
    hundred = [float(n) for n in range(100, 0, -1)]
    assert [percentile(hundred, percent) for percent in (50, 90, 99, 100)] == [50.0, 90.0, 99.0, 100.0]
    assert [percentile([3.0, 1.0, 2.0], percent) for percent in (1, 33, 34, 50, 66, 67, 99)] == [1, 1, 2, 2, 2, 3, 3]
    assert percentile([7.0], 99) == 7.0
    assert percentile([float(n) for n in range(1000)], 99) == 989.0


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_no_more_threads_than_cores(cores, clients):
    threads, workers = share(cores, clients)
    assert threads * workers <= cores
    assert 1 <= workers <= clients
    assert share(cores, clients, 1) == (1, min(cores, clients))
    assert share(cores, clients, cores) == (cores, 1)


class Counting:
    """A model that knows how many calls are in it; its first ones wait until as many as `wanted` are."""

    def __init__(self, wanted):
        self.wanted, self.there = wanted, threading.Event()
        self.lock = threading.Lock()
        self.inside = self.most = self.calls = 0

    def __call__(self, _):
        with self.lock:
            self.inside += 1
            self.calls += 1
            self.most = max(self.most, self.inside)
            if self.inside == self.wanted:
                self.there.set()
        assert self.there.wait(timeout=60)
        with self.lock:
            self.inside -= 1


@pytest.mark.parametrize(("clients", "workers"), [(1, 1), (4, 4), (8, 2)])
def test_clients_are_answered_at_the_same_time(clients, workers):
    """As many as there are workers, and no more."""
    model = Counting(workers)
    with serving([Contender("A", model)] * workers) as ask:
        found = drive(ask, clients, 0.0, 0)
    assert model.most == workers
    assert model.calls == found.answered == latency.LEAST * clients
    assert len(found.seconds) == (latency.LEAST - 1) * clients  # each client's first is not counted


def test_the_wait_for_a_worker_is_counted(monkeypatch):
    """By a clock that counts the calls done: of two clients who asked at 0, one worker answers the second at 2."""
    monkeypatch.setattr(latency, "LEAST", 1)
    monkeypatch.setattr(latency, "UNCOUNTED", 0)
    done, both = [], threading.Barrier(2)
    with serving([Contender("A", lambda _: done.append(1))]) as ask:
        found = drive(lambda: (both.wait(60), ask()), 2, 0.0, 0, clock=lambda: len(done))
    assert max(found.seconds) == 2


def test_time_and_requests_are_bounded():
    with serving([Contender("A", lambda _: None)]) as ask:
        assert drive(ask, 2, 60.0, 20).answered == 20
        now = itertools.count()
        found = drive(ask, 1, 10.0, 10**6, clock=lambda: next(now))
    assert latency.LEAST <= found.answered < 10
    assert found.per_second == found.answered / found.wall_s


def test_contenders_take_turns():
    order = []
    servers = {name: (lambda name=name: order.append(name)) for name in "AB"}
    found = take_turns(servers, 1, 60.0, most=0)
    assert "".join(order) == ("A" * latency.LEAST + "B" * latency.LEAST) * latency.ROUNDS
    assert found["A"].answered == latency.LEAST * latency.ROUNDS


def test_no_further_round_when_the_time_is_over():
    now = itertools.count()
    found = take_turns({"A": lambda: None, "B": lambda: None}, 2, 1.0, most=0, clock=lambda: next(now))
    assert found["A"].answered == found["B"].answered == 2 * latency.LEAST


def test_workers_run_in_their_context_and_errors_reach_the_client():
    seen = []

    def fails(_):
        seen.append((torch.is_inference_mode_enabled(), backends.forced(), torch.get_num_threads()))
        raise RuntimeError("planted")

    torch.set_num_threads(1)
    cell = dataclasses.replace(CELL, dtype="bf16")
    with serving([Contender("A", fails, context=partial(workloads.running, cell, "eager"))] * 2) as ask:
        with pytest.raises(RuntimeError, match="planted"):
            ask()
        with pytest.raises(RuntimeError, match="planted"):
            drive(ask, 2, 0.0, 0)
    assert set(seen) == {(True, "reference", 1)}


def rows(cell=CELL, folder=None):
    return measure.latency_rows(Load(cell, (1, 3), 2), 1, 0.001, 100, folder)


def test_rows():
    found = rows()
    assert [(row["clients"], row["contender"]) for row in found] == list(itertools.product((1, 3), latency.CONTENDERS))
    for row in found:
        assert (row["subject"], row["workers"], row["threads"], row["batch"]) == ("latency", 2, 1, 1)
        assert 0 < row["p50_s"] <= row["p90_s"] <= row["p99_s"]
        assert row["per_second"] > 0
        assert row["requests"] >= row["clients"] * (latency.LEAST - latency.UNCOUNTED)
    assert all(row["check"] for row in found if row["contender"] == "fused")
    headings, lines = report_latency.latency_table(found)
    assert all(len(line) == len(headings) for line in lines)


@pytest.mark.parametrize("name", peers.NAMES)
def test_rows_of_peers(name, folder):
    if name not in peers.installed():
        pytest.skip(peers.left_out())
    found = rows(dataclasses.replace(CELL, contenders=("fused", name)), folder)
    assert all(row["p50_s"] > 0 for row in found)


def test_what_cannot_run_says_why(monkeypatch):
    def refuses(*_):
        raise peers.NotAvailable("planted")

    monkeypatch.setitem(peers._BUILDERS, "openvino", refuses)
    monkeypatch.setattr(peers, "version", lambda name: f"{name} 1.0")
    _, row = measure.latency_rows(Load(dataclasses.replace(CELL, contenders=("eager", "openvino")), (1,), 1), 1, 0.001,
                                  10, None)  # fmt: skip
    assert row["failure"] == "not available: planted"
    assert "per_second" not in row
    assert workloads.NOT_AVAILABLE in report_latency.latency_table([row])[1][0]


@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the compiled module is not there")
def test_a_wrong_model_is_not_timed(monkeypatch):
    from mambaout_kernels.inference import parts

    right = parts.blocks_op.gated_cnn_blocks
    monkeypatch.setattr(parts.blocks_op, "gated_cnn_blocks", lambda *args: right(*args).flip(-1))
    fused, eager = measure.latency_rows(Load(CELL, (1,), 1), 1, 0.001, 10, None)
    assert fused["check"] is False
    assert "per_second" not in fused
    assert "p50_s" not in fused
    assert "per_second" in eager
    assert report.red([fused]) == [fused]


def test_slower_loads_are_listed():
    common = {"subject": "latency", "label": "a", "batch": 1, "dtype": "fp32", "clients": 2, "workers": 2, "threads": 1}
    fused = {**common, "contender": "fused", "p50_s": 1.0, "p99_s": 2.0, "per_second": 10.0}
    eager = {**common, "contender": "eager", "p50_s": 2.0, "p99_s": 4.0, "per_second": 5.0}
    assert report_latency.slower_loads([fused, eager]) == []
    [line] = report_latency.slower_loads([fused, {**eager, "p99_s": 1.0, "per_second": 20.0}])
    assert line == "eager partial: 0.50x by p99, 0.50x by per_second: a, batch 1, fp32, clients: 2"


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_latency.draw(tmp_path / "a.png", rows(), "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plot_latency.draw(tmp_path / "b.png", [], "title")


def test_job_as_json():
    job = Job(1, 0.5, loads=[Load(CELL, (1, 2), 2)], cold_starts=[CELL], most_requests=7)
    assert Job.from_json(job.to_json()) == job
    assert job.steps == 2


def test_cold_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(cold_start, "STARTS", 1)
    found = measure.cold_start_rows(dataclasses.replace(CELL, contenders=cold_start.OWN), 1, tmp_path)
    assert [row["contender"] for row in found] == list(cold_start.OWN)
    for row in found:
        assert row["check"], row
        assert row["ready_s"] == pytest.approx(row["import_s"] + row["load_s"])
        assert row["first_s"] > 0
        assert row["warm_s"] > 0
        if row["steady_bytes"] is not None:
            assert 2**20 < row["steady_bytes"] <= row["peak_bytes"]
    headings, lines = report_latency.cold_start_table(found)
    assert all(len(line) == len(headings) for line in lines)


@pytest.mark.parametrize("name", peers.NAMES)
def test_cold_starts_of_peers(name, folder, monkeypatch):
    if name not in peers.installed():
        pytest.skip(peers.left_out())
    monkeypatch.setattr(cold_start, "STARTS", 1)
    [row] = measure.cold_start_rows(dataclasses.replace(CELL, contenders=(name,)), 1, folder)
    assert row["check"], row
    assert row["ready_s"] > 0


def test_a_wrong_cold_start_has_no_figures(tmp_path, monkeypatch):
    wrong = dict.fromkeys((*cold_start.SECONDS, *cold_start.BYTES), 1.0) | {"y": [[0.0] * 1000]}
    monkeypatch.setattr(cold_start, "_run", lambda start: wrong)
    [row] = measure.cold_start_rows(dataclasses.replace(CELL, contenders=("eager",)), 1, tmp_path)
    assert row["check"] is False
    assert "ready_s" not in row


def test_a_cold_start_that_fails_says_what_it_wrote(tmp_path, monkeypatch):
    (tmp_path / "process.py").write_text("raise MemoryError('planted')")
    monkeypatch.setattr(cold_start, "_PROCESS", tmp_path / "process.py")
    with pytest.raises(RuntimeError, match=r"a cold start of eager, from a checkpoint failed: [\S\s]*planted"):
        cold_start._run({"name": "eager"})


@pytest.mark.usefixtures("forked_workers")
def test_bench_latency(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", 1)
    command = ["bench", "latency", "--variant", "test_mambaout", "--dtype", "fp32", "--batch", "1", "--no-cold-start"]
    command += ["--concurrency", "1,4", "--budget", "0.01", "--no-peers", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    for words in ("p99, ms", "images/s", "workers x thr"):
        assert words in out
    document = json.loads((tmp_path / "latency.json").read_text())
    found = document["results"]
    assert {(row["clients"], row["contender"]) for row in found} == set(itertools.product((1, 4), latency.CONTENDERS))
    assert all(row["workers"] * row["threads"] <= document["machine"]["cores"] for row in found)
    assert all(row["check"] for row in found if row["contender"] == "fused")
    assert "p99_s" in (tmp_path / "latency.csv").read_text().splitlines()[0]
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("value", "shown"), [(0.0123456, "0.0123"), (95.44, "95.4"), (627.4, "627"), (5031.2, "5031")])
def test_milliseconds_have_no_exponent(value, shown):
    assert report_latency._number(value, ".3g") == shown
