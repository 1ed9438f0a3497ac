"""CUDA graphs of an inference model: which call captures, which replays; by a stand-in where there is no GPU."""

import copy
import pickle
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.inference import cuda_graphs
from mambaout_kernels.inference.model import InferenceModel

SMALL = {"depths": (1, 1), "dims": (8, 16), "num_classes": 10}


class Graph:
    """What a captured graph does: the same function again, on the same memory."""

    def __init__(self, function, x):
        self.function, self.x, self.y, self.replays = function, x, function(x), 0

    def replay(self):
        self.replays += 1
        self.y.copy_(self.function(self.x))


class Event:
    def record(self, stream=None): ...


class Stream:
    def wait_event(self, event): ...


@pytest.fixture
def captured(monkeypatch):
    """The graphs that were captured, in order."""
    graphs = []

    def capture(function, x):
        graphs.append(Graph(function, x))
        return graphs[-1], graphs[-1].y

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    with torch.no_grad():
        yield graphs


def test_nothing_runs_on_the_stream_of_a_capture_before_it(monkeypatch):
    """Else the graph keeps a workspace of cuBLAS's that is not its own, and may be freed."""
    current, ran = ["default"], []

    @contextmanager
    def on(stream):
        before, current[0] = current[0], stream
        yield
        current[0] = before

    @contextmanager
    def graph(_graph, stream, **_):
        with on(stream):
            ran.append("capture")
            yield

    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ran.append("synchronize"))

    def function(x):
        ran.append(current[0])
        return x

    cuda_graphs.capture(function, torch.ones(1))
    *before, synchronize, capture, inside = ran
    assert before == ["default"] * len(before)
    assert before
    assert (synchronize, capture) == ("synchronize", "capture")
    assert inside != "default"


def double(x):
    return 2 * x


def test_one_graph_per_shape_and_dtype(captured):
    run = cuda_graphs.CudaGraphs(double)
    for x in (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3, 3), torch.ones(2, 3).bfloat16(), torch.ones(2, 3)):
        assert torch.equal(run(x), 2 * x)
    assert [tuple(g.x.shape) for g in captured] == [(2, 3), (3, 3), (2, 3)]
    assert [g.replays for g in captured] == [3, 1, 1]


def test_results_are_not_written_over_by_the_next_call(captured):
    run = cuda_graphs.CudaGraphs(double)
    first = run(torch.ones(2))
    assert torch.equal(run(torch.full((2,), 5.0)), torch.full((2,), 10.0))
    assert torch.equal(first, torch.full((2,), 2.0))


def test_the_input_may_have_any_strides_and_stays_as_it_is(captured):
    run, x = cuda_graphs.CudaGraphs(double), torch.arange(6.0).view(2, 3).t()
    assert torch.equal(run(x), 2 * x)
    assert torch.equal(run(x.contiguous()), 2 * x)
    assert len(captured) == 1
    assert captured[0].x.data_ptr() != x.data_ptr()


def test_further_shapes_run_without_a_graph(captured, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_SHAPES", 2)
    run = cuda_graphs.CudaGraphs(double)
    for size in (1, 2, 3, 4, 1):
        assert torch.equal(run(torch.ones(size)), torch.full((size,), 2.0))
    assert len(captured) == 2


def test_threads_do_not_mix_their_inputs(captured):
    run, wrong = cuda_graphs.CudaGraphs(double), []

    def call(value):
        x = torch.full((64,), float(value))
        wrong.extend(value for _ in range(200) if not torch.equal(run(x), 2 * x))

    threads = [threading.Thread(target=call, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(captured) == 1


def test_a_model_replays_and_its_copies_capture_anew(captured):
    fast = mk.optimize_for_inference(enlivened(mk.MambaOut(**SMALL)).eval())
    graphed = InferenceModel(fast.model, list(fast.report()), fast.dtype, cuda_graphs=True)
    images = torch.randn(1, 3, 32, 32)
    expected = fast(images)
    assert torch.equal(graphed(images), expected)
    assert torch.equal(graphed(images), expected)
    assert (len(captured), captured[0].replays) == (1, 2)
    assert torch.equal(graphed.forward_features(images), fast.forward_features(images))  # without a graph
    for copied in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        count = len(captured)
        assert torch.equal(copied(images), expected)
        assert len(captured) == count + 1
    assert captured[0].replays == 2


def test_on_the_cpu_they_are_refused():
    with pytest.raises(ValueError, match="cuda_graphs must be False on cpu"):
        mk.optimize_for_inference(nn.Sequential(mk.FusedGatedCNNBlock(8)).eval(), cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model = enlivened(mk.MambaOut(**SMALL)).eval()
    plain = mk.optimize_for_inference(model, device="cuda", dtype=torch.bfloat16)
    fast = mk.optimize_for_inference(model, device="cuda", dtype=torch.bfloat16, cuda_graphs=True)
    for batch in (1, 2, 1):
        images = torch.randn(batch, 3, 32, 32, device="cuda")
        assert torch.equal(fast(images), plain(images))
