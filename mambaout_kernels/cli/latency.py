"""bench latency: a model under the load of several clients, and from a cold start; its arguments, jobs and tables."""

import argparse
import itertools
from collections.abc import Sequence

from ..benchmarking import cold_start, latency, machine, peers, report_latency, shapes, workloads
from ..benchmarking.latency import Load
from ..benchmarking.measure import Row
from ..benchmarking.worker import Job
from ..benchmarking.workloads import Cell
from .terminal import UsageError, comma_list, one_of, positive, positive_seconds, require, show_table

HELP = "a model called by several clients at once: percentiles of latency, throughput; cold start and memory"
DESCRIPTION = (
    "On the CPU. Each client asks again as soon as it has its answer; a request waits where all workers are busy, and "
    "that wait is counted. Contenders take turns in slices of time. Cold starts are processes of their own: import, "
    "load, first call, warm call, resident memory."
)
MOST_CLIENTS = 64


def add_arguments(command: argparse.ArgumentParser) -> None:
    variants = shapes.variants()
    command.add_argument("--variant", type=comma_list(one_of(variants)), default=variants[:1], metavar="NAMES",
                         help=f"of {', '.join(variants)}; default: {variants[0]}")  # fmt: skip
    command.add_argument("--dtype", type=comma_list(one_of(list(workloads.DTYPES))), default=["fp32", "bf16"],
                         metavar="NAMES", help=f"of {', '.join(workloads.DTYPES)}; default: fp32,bf16")  # fmt: skip
    command.add_argument("--batch", type=comma_list(positive), default=list(shapes.BATCHES), metavar="N,..",
                         help=f"images per request; default: {','.join(map(str, shapes.BATCHES))}")  # fmt: skip
    command.add_argument("--concurrency", type=comma_list(positive), default=[1, 2, 4, 8], metavar="N,..",
                         help="clients at once; default: 1,2,4,8")  # fmt: skip
    command.add_argument("--threads", type=positive, metavar="N",
                         help="per call; default: the cores divided by the clients, at least 1. As many workers answer "
                         "as there are cores for, at most one per client")  # fmt: skip
    command.add_argument("--budget", type=positive_seconds, default=20.0, metavar="SECONDS",
                         help="per cell, all contenders together; each client asks at least "
                         f"{latency.LEAST} times in each of {latency.ROUNDS} slices; default: %(default)s")  # fmt: skip
    command.add_argument("--requests", type=positive, default=latency.MOST_REQUESTS, metavar="N",
                         help="at most, of each contender in a cell; default: %(default)s")  # fmt: skip
    command.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True,
                         help=f"{' and '.join(peers.NAMES.values())} too, those installed")  # fmt: skip
    command.add_argument("--cold-start", action=argparse.BooleanOptionalAction, default=True,
                         help=f"{cold_start.STARTS} cold starts of each contender too")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes."""
    if max(args.concurrency) > MOST_CLIENTS:
        raise UsageError(f"--concurrency {max(args.concurrency)}: at most {MOST_CLIENTS} clients")
    cores = len(machine.usable_cores())
    if args.threads is not None and args.threads > cores:
        raise UsageError(f"--threads {args.threads}: this process may use {cores} cores")
    if args.cold_start:
        require("numpy", "numpy", "test", "the cold start (--no-cold-start leaves it out)")
        require("safetensors", "safetensors", "cli", "the cold start (--no-cold-start leaves it out)")


def jobs(args: argparse.Namespace) -> list[Job]:
    """One per number of threads and workers; then, on all cores, the cold starts."""
    cores = len(machine.usable_cores())
    groups: dict[tuple[int, int], list[int]] = {}
    for clients in dict.fromkeys(args.concurrency):
        groups.setdefault(latency.share(cores, clients, args.threads), []).append(clients)
    others = peers.installed() if args.peers else []
    cells = [
        Cell("model", "fwd", dtype, batch, shapes.stages(variant)[0], (*latency.CONTENDERS, *others))
        for variant, dtype, batch in itertools.product(args.variant, args.dtype, args.batch)
    ]
    found = [
        Job(threads, args.budget, loads=[Load(cell, tuple(clients), workers) for cell in cells],
            most_requests=args.requests)
        for (threads, workers), clients in groups.items()
    ]  # fmt: skip
    if args.cold_start:
        starts = [
            Cell("model", "fwd", dtype, 1, shapes.stages(variant)[0], (*cold_start.OWN, *others))
            for variant, dtype in itertools.product(args.variant, args.dtype)
        ]
        found.append(Job(args.threads or cores, args.budget, cold_starts=starts))
    return found


def show(rows: Sequence[Row]) -> None:
    title = (
        "latency: half, 90 and 99 of 100 requests were answered within; workers x thr: calls at once, and threads of "
        "each;\ncheck: against fp64, and how far from eager, as a share of the largest value"
    )
    show_table(title, *report_latency.latency_table(rows))
    show_table("cold start, medians: ready is import and load", *report_latency.cold_start_table(rows))
    if behind := report_latency.slower_loads(rows):
        print(f"SLOWER: fused is behind another under {len(behind)} loads:", *behind, sep="\n  ")
