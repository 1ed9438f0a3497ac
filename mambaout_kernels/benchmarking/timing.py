"""The timing harness: contenders take turns in one process, many short repetitions, minimum and median."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Stopwatch = Callable[[Callable[[], object]], float]  # runs it, and returns the seconds that it took


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """Something to time: `run(prepare())`, of which only `run` is timed, all of it inside `context()`."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Timing:
    """What one contender took, in seconds, in the order of its repetitions."""

    seconds: list[float] = field(default_factory=list)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def by_host(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """By the host's clock: all of a call on the CPU."""

    def timed(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    return timed


def by_cuda_events() -> Stopwatch:
    """By events on the current CUDA stream: what the device took, operands not in its L2 cache.

    A buffer of several times the cache's size is written first. That empties the cache, and while it runs the host has
    time to enqueue what is timed; where the host takes longer than that, its time shows, as it would to a user.
    """
    size = 4 * torch.cuda.get_device_properties().L2_cache_size
    buffer = torch.empty(max(size, 256 << 20), dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(run: Callable[[], object]) -> float:
        buffer.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return timed


def captured(contender: Contender) -> Contender:
    """The contender as a CUDA graph, replayed: no time of the host is in it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with contender.context():
        for _ in range(3):  # on another stream: the graph has a workspace of cuBLAS's of its own
            contender.run(contender.prepare())
    torch.cuda.synchronize()
    with contender.context(), torch.cuda.stream(stream):
        prepared = contender.prepare()  # on the stream that captures: a backward runs on its forward's
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            contender.run(prepared)

    def replay(_prepared: object, _alive: object = (contender, prepared)) -> None:
        graph.replay()  # on the memory of what was captured, weights too

    return replace(contender, run=replay, prepare=_nothing, context=nullcontext)


# A first round of more seconds is all of the warm-up, and three are timed: a cell would take minutes.
LONG_ROUND_S = 10.0
ROUNDS_OF_LONG = 3


def interleave(
    contenders: Sequence[Contender],
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 2000,
    warmup_rounds: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
    settle: Callable[[], object] = _nothing,
) -> dict[str, Timing]:
    """Time contenders A B A B ...: whatever disturbs the machine meets all of them alike.

    Rounds are run until `budget_s` seconds of `clock` have passed, but at least `min_rounds` (of long rounds
    ROUNDS_OF_LONG) and at most `max_rounds`.
    `stopwatch` times a repetition; None: the clock. `settle` is called before each repetition, untimed: it can wait
    until the threads of the contender before have gone to sleep.
    """
    timed = stopwatch or by_host(clock)

    def once(contender: Contender) -> float:
        with contender.context():
            prepared = contender.prepare()
            settle()
            return timed(lambda: contender.run(prepared))

    for _ in range(warmup_rounds):
        start = clock()
        for contender in contenders:
            once(contender)
        if clock() - start > LONG_ROUND_S:
            min_rounds = min(min_rounds, ROUNDS_OF_LONG)
            break
    timings = {contender.name: Timing() for contender in contenders}
    gc_was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for finished in range(max_rounds):
            if finished >= min_rounds and clock() - start >= budget_s:
                break
            for contender in contenders:
                timings[contender.name].seconds.append(once(contender))
    finally:
        if gc_was_enabled:
            gc.enable()
    return timings
