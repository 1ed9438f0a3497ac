"""Latency and throughput under load: clients that ask again as soon as they have their answer, and workers that answer.

Contenders take turns in slices of time, within one process. A request waits where all workers are busy, as it would in
a server; its latency has that wait in it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread

from .timing import Contender
from .workloads import Cell

CONTENDERS = ("fused", "eager")
PERCENTS = (50, 90, 99)
ROUNDS = 4  # slices of each contender
LEAST = 2  # requests of a client in a slice
UNCOUNTED = 1  # of these, the first, which finds no queue yet
MOST_REQUESTS = 10_000  # of a contender in a cell

Ask = Callable[[], object]  # returns when the request is answered


@dataclass(frozen=True)
class Load:
    """A cell under the load of each of these numbers of clients, on so many workers."""

    cell: Cell
    clients: tuple[int, ...]
    workers: int


@dataclass
class Requests:
    """What one contender answered, in seconds: each request that counts, and all of its slices together."""

    seconds: list[float] = field(default_factory=list)
    answered: int = 0  # those that do not count too
    wall_s: float = 0.0

    @property
    def per_second(self) -> float:
        return self.answered / self.wall_s


def percentile(seconds: Sequence[float], percent: int) -> float:
    """The least of `seconds` that `percent` of them do not exceed (nearest rank)."""
    return sorted(seconds)[max(0, -(-percent * len(seconds) // 100) - 1)]


def share(cores: int, clients: int, threads: int | None = None) -> tuple[int, int]:
    """(threads per call, workers): no more clients at work than there are cores for, the others wait.

    `threads` None: the cores are divided among the clients.
    """
    threads = threads or max(1, cores // clients)
    return threads, max(1, min(clients, cores // threads))


@contextmanager
def serving(workers: Sequence[Contender]) -> Iterator[Ask]:
    """A thread for each worker, in its context; they take requests in the order in which these came.

    What a worker raises, the request raises.
    """
    requests: SimpleQueue[Future[object] | None] = SimpleQueue()

    def work(worker: Contender) -> None:
        with worker.context():
            prepared = worker.prepare()
            while (request := requests.get()) is not None:
                try:
                    request.set_result(worker.run(prepared))
                except Exception as error:
                    request.set_exception(error)

    def ask() -> object:
        request: Future[object] = Future()
        requests.put(request)
        return request.result()

    threads = [Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield ask
    finally:
        for _ in threads:
            requests.put(None)
        for thread in threads:
            thread.join()


def drive(
    ask: Ask, clients: int, duration_s: float, most: int, clock: Callable[[], float] = time.perf_counter
) -> Requests:
    """One slice: every client asks LEAST times, then until the time or `most` requests of all of them are over."""
    start = clock()
    each = max(LEAST, most // clients)

    def client(_: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < LEAST or (len(seconds) < each and clock() - start < duration_s):
            asked = clock()
            ask()
            seconds.append(clock() - asked)
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(client, range(clients)))
    wall_s = clock() - start
    return Requests([one for seconds in found for one in seconds[UNCOUNTED:]], sum(map(len, found)), wall_s)


def take_turns(
    servers: Mapping[str, Ask],
    clients: int,
    budget_s: float,
    most: int = MOST_REQUESTS,
    settle: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Requests]:
    """Every contender's requests, from slices A B A B ..., all of them together of about `budget_s` seconds.

    Slices take longer where that is too little for LEAST requests of each client; no round begins after `budget_s`.
    `settle` is called before each slice: it can wait until the threads of the one before have gone to sleep.
    """
    slice_s = budget_s / (ROUNDS * max(1, len(servers)))
    found = {name: Requests() for name in servers}
    start = clock()
    for finished in range(ROUNDS):
        if finished and clock() - start >= budget_s:
            break
        for name, ask in servers.items():
            settle()
            one = drive(ask, clients, slice_s, most // ROUNDS)
            found[name].seconds += one.seconds
            found[name].answered += one.answered
            found[name].wall_s += one.wall_s
    return found
