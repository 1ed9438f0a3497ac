"""The timing harness: contenders take turns in one process, many short repetitions, minimum and median."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any


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


def interleave(
    contenders: Sequence[Contender],
    budget_s: float,
    min_rounds: int = 5,
    max_rounds: int = 2000,
    warmup_rounds: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], object] = _nothing,
    settle: Callable[[], object] = _nothing,
) -> dict[str, Timing]:
    """Time contenders A B A B ...: whatever disturbs the machine meets all of them alike.

    Rounds are run until `budget_s` seconds have passed, but at least `min_rounds` and at most `max_rounds`.
    `synchronize` waits for a device; it is called before each reading of the clock. `settle` is called before each
    repetition, untimed: it can wait until the threads of the contender before have gone to sleep.
    """

    def once(contender: Contender) -> float:
        with contender.context():
            prepared = contender.prepare()
            synchronize()
            settle()
            start = clock()
            contender.run(prepared)
            synchronize()
            return clock() - start

    for _ in range(warmup_rounds):
        for contender in contenders:
            once(contender)
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
