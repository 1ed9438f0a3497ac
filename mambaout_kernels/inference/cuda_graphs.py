"""A CUDA graph for each shape of input: a network's launches as one, which takes no time of the host."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST_SHAPES = 16  # each graph keeps the network's activations; further shapes run without
_WARM_UP = 3  # calls before the capture: kernels are compiled, libraries choose and allocate


@dataclass
class _Graph:
    graph: Any  # torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor
    done: Any  # torch.cuda.Event: the last replay, and its copy
    lock: threading.Lock = field(default_factory=threading.Lock)


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def capture(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, Tensor]:
    """(graph, y): function(x), to be replayed on x's memory into y's."""
    for _ in range(_WARM_UP):
        function(x)
    torch.cuda.synchronize()
    # On a stream that nothing ran on: cuBLAS keeps a workspace for each, and one from before the capture would not be
    # the graph's. torch.compile's CUDA graphs have all of these freed, and a replay would write where others are.
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    # Other threads may go on calling CUDA meanwhile; what they do is not captured.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        y = function(x)
    return graph, y


class CudaGraphs:
    """function(x) on a GPU, by a graph for each shape, captured at its first call. Safe from several threads at once.

    function: of one tensor to one tensor, the same launches at every call. The weights that it reads must stay where
    they are, which those of an InferenceModel do.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self._function = function
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        if not on_gpu(x) or torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling():
            return self._function(x)
        held = self._held(x)
        if held is None:
            return self._function(x)
        with held.lock, torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(held.done)
            held.x.copy_(x)
            held.graph.replay()
            y = held.y.clone()
            held.done.record(stream)
        return y

    def _held(self, x: Tensor) -> _Graph | None:
        key = (tuple(x.shape), x.dtype, x.device)
        with self._lock:
            if key not in self._graphs:
                if len(self._graphs) >= MOST_SHAPES:
                    return None
                with torch.cuda.device(x.device):
                    own = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
                    graph, y = capture(self._function, own)
                    done = torch.cuda.Event()
                    done.record()
                self._graphs[key] = _Graph(graph, own, y, done)
            return self._graphs[key]
