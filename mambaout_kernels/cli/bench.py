"""bench: times the op, a block, a model, the overhead of a call, or the main job, beside PyTorch."""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends
from ..benchmarking import (
    inputs,
    machine,
    peers,
    plot,
    plot_against,
    plot_latency,
    report,
    report_parts,
    shapes,
    workloads,
)
from ..benchmarking.against import Against
from ..benchmarking.measure import Row
from ..benchmarking.run import Outcome, WorkerError
from ..benchmarking.run import run as run_jobs
from ..benchmarking.worker import Job
from ..benchmarking.workloads import Cell
from . import against, latency
from .terminal import (
    UsageError,
    check_writable,
    comma_list,
    one_of,
    positive,
    positive_seconds,
    printable,
    progress,
    require,
    show_table,
    writing,
)

_MODES = {**{mode: mode for mode in workloads.MODES}, "infer": "fwd"}
_HELP = {
    "op": "the fused op alone: split, convolution, activation, cat, product",
    "block": "a whole Gated CNN block; with the memory of an inference and of a training step",
    "model": "a whole model, beside other runtimes; part by part; with the memory of an inference",
    "main": "op, blocks and model on real photographs: what `make bench` runs",
    "overhead": "what a call of the op costs in Python",
}
_NEXT = {
    "main": "`mambaout-kernels bench model` (beside other runtimes, part by part), `bench latency` (under load)",
    "model": "`mambaout-kernels bench latency` (under load, from a cold start)",
    "block": "`mambaout-kernels bench model`",
    "op": "`mambaout-kernels bench block`",
}
_PLOTS = {"latency": plot_latency.draw, "against": plot_against.draw}  # by the file's name; others have bars
_DEFAULT_MODES = {"op": ["fwd", "bwd"], "block": ["fwd", "train"], "model": ["fwd"]}


def add_to(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="speed and memory beside PyTorch",
        description="Contenders take turns in one process per number of threads; one thread is pinned to a core. Times "
        "are minimum and median; ratios are of medians. Modes: "
        + "; ".join(f"{mode}: {meaning}" for mode, meaning in workloads.MODES.items())
        + "; infer: the same as fwd.",
    )
    subjects = bench.add_subparsers(required=True, metavar="WHAT", dest="what")
    for name, text in _HELP.items():
        command = subjects.add_parser(name, help=text, description=text, epilog=bench.description)
        _add_common(command, name)
        if name != "overhead":
            _add_selection(command, name)
        _add_output(command, name)
        command.set_defaults(run=run)
    command = subjects.add_parser("latency", help=latency.HELP, description=latency.DESCRIPTION)
    latency.add_arguments(command)
    _add_output(command, "latency")
    command.set_defaults(run=run)


def _add_common(command: argparse.ArgumentParser, name: str) -> None:
    cores = len(machine.usable_cores())
    threads = [1] if name == "overhead" else sorted({1, cores})
    command.add_argument("--threads", type=comma_list(positive), default=threads, metavar="N,..",
                         help=f"default: {','.join(map(str, threads))}")  # fmt: skip
    command.add_argument("--budget", type=positive_seconds, metavar="SECONDS",
                         default=0.5 if name == "main" else 1.0,
                         help="per comparison, warm-up aside; at least 5 rounds; default: %(default)s")  # fmt: skip


def _add_output(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--out", type=Path, metavar="DIR", default=Path("bench-results") if name == "main" else None,
                         help="write NAME.json, .csv and .png there; default: %(default)s")  # fmt: skip
    command.add_argument("--plot", action=argparse.BooleanOptionalAction, default=name != "overhead",
                         help="the PNG among the files, by matplotlib")  # fmt: skip


def _add_selection(command: argparse.ArgumentParser, name: str) -> None:
    variants, main = shapes.variants(), name == "main"
    command.add_argument("--variant", type=comma_list(one_of(variants)), default=variants[:1], metavar="NAMES",
                         help=f"of {', '.join(variants)}; default: {variants[0]}")  # fmt: skip
    command.add_argument("--dtype", type=comma_list(one_of(list(workloads.DTYPES))), default=["fp32", "bf16"],
                         metavar="NAMES", help=f"of {', '.join(workloads.DTYPES)}; default: fp32,bf16")  # fmt: skip
    usual = "8, on a GPU 128" if main else ",".join(map(str, shapes.BATCHES))
    command.add_argument("--batch", type=comma_list(positive), metavar="N,..", help=f"default: {usual}")
    if not main:
        command.add_argument("--mode", type=comma_list(one_of(list(_MODES))), default=_DEFAULT_MODES[name],
                             metavar="NAMES", help=f"of {', '.join(_MODES)}; default: "
                             f"{','.join(_DEFAULT_MODES[name])}")  # fmt: skip
    if name in ("op", "block"):
        command.add_argument("--stage", type=comma_list(positive), default=[], metavar="N,..",
                             help="of the variant, from 1; default: all")  # fmt: skip
    command.add_argument("--compile", action=argparse.BooleanOptionalAction, default=name == "model",
                         help="torch.compile of eager too; takes minutes")  # fmt: skip
    more = [name for name in workloads.CONTENDERS if name not in ("fused", "modules", "eager", *peers.NAMES)]
    command.add_argument("--also", type=comma_list(one_of(more)), default=[], metavar="NAMES",
                         help=f"more contenders, of {', '.join(more)}")  # fmt: skip
    command.add_argument("--graph", action="store_true",
                         help="every contender as a CUDA graph that is replayed: without the host's time")  # fmt: skip
    command.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True,
                         help="the naive full-channel baseline too")  # fmt: skip
    command.add_argument("--device", type=one_of(["auto", "cpu", "cuda"]), default="auto",
                         help="auto: cuda where a backend for it can run, else cpu")  # fmt: skip
    source = "random" if name in ("op", "block") else "photographs"
    command.add_argument("--input", type=one_of(inputs.SOURCES), default=source,
                         help=f"{' or '.join(inputs.SOURCES)} (scikit-image's); default: {source}")  # fmt: skip
    if name != "op":
        command.add_argument("--autocast", action="store_true",
                             help="parameters stay fp32 and PyTorch casts, as in mixed-precision training")  # fmt: skip
    if name in ("block", "model"):
        command.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True,
                             help="measure the memory too: of an inference, and of a training step")  # fmt: skip
        command.add_argument("--peers", action=argparse.BooleanOptionalAction, default=name == "model",
                             help=f"{' and '.join(peers.NAMES.values())} too, those installed; in mode fwd on the "
                             "CPU")  # fmt: skip
    if name == "model":
        command.add_argument("--stages", action=argparse.BooleanOptionalAction, default=True,
                             help="fused and eager part by part too: stem, stages, downsamples, head")  # fmt: skip
        against.add_argument(command)


def run(args: argparse.Namespace) -> int:
    _require(args)
    jobs = _jobs(args)
    _check_memory(jobs)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del settings["run"]
    warnings = machine.unquiet()
    for warning in warnings:
        print(f"warning: not a quiet machine: {warning}", file=sys.stderr)
    steps = sum(job.steps for job in jobs)
    if (least := sum(job.least_s for job in jobs)) > 10:
        print(f"{steps} steps; the timing alone takes some {least:.0f} s, checks against fp64 as long", file=sys.stderr)
    try:
        with progress(steps) as step:
            outcome = run_jobs(jobs, lambda job, text: step(f"{text}, {_threads(job.threads)}"))
    except WorkerError as error:
        reason, _, log = str(error).partition("\n")
        told = reason if "allocate memory" in reason else f"{reason}\n{log}"
        raise UsageError(f"the benchmark stopped: {told}") from None
    warnings += outcome.disturbances + report.spread(outcome.rows)
    try:
        _show(args, outcome, warnings)
    finally:  # also where nobody reads what is shown
        if args.out is not None:
            _write(args, outcome, settings, warnings)
    return 1 if report.red(outcome.rows) else 0


def _require(args: argparse.Namespace) -> None:
    """Refuse at once what would fail after minutes."""
    if getattr(args, "input", None) == "photographs":
        require("skimage", "scikit-image", "bench", "--input photographs")
        require("PIL", "pillow", "cli", "--input photographs")
    if args.out is not None and args.plot:
        require("matplotlib", "matplotlib", "bench", "the plot (--no-plot leaves it out)")
    if args.out is not None:
        for path in _files(args):
            check_writable("--out", path)
    if args.what == "latency":
        latency.check(args)
        return
    cores = len(machine.usable_cores())
    if max(args.threads) > cores:
        raise UsageError(f"--threads {max(args.threads)}: this process may use {cores} cores")
    if args.what == "overhead" and (reason := backends.status()["cpu"]) is not None:
        raise UsageError(f"bench overhead measures over the compiled CPU op: {reason}")


def _check_memory(jobs: Sequence[Job]) -> None:
    """Refuse what cannot fit before the system ends the process for it."""
    if not hasattr(os, "sysconf"):
        return
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for cell in (cell for job in jobs for cell in _largest_cells(job)):
        shape = cell.shape
        u = cell.batch * shape.height * shape.width * 2 * shape.hidden * workloads.DTYPES[cell.dtype].itemsize
        if u > available:
            raise UsageError(
                f"--batch {cell.batch}: u of {shape.label} alone takes {u / 1e9:.0f} GB, this machine has "
                f"{available / 1e9:.0f} GB"
            )


def _largest_cells(job: Job) -> list[Cell]:
    """Those whose activations may not fit."""
    others = [*(load.cell for load in job.loads), *(cell for each in job.against for cell in each.cells)]
    return [*job.timed, *job.memory, *others]


def _device(wanted: str) -> str:
    if wanted == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise UsageError("--device cuda: PyTorch finds no CUDA device")
        return "cpu"
    status = backends.status()
    return "cuda" if wanted == "cuda" or None in (status["triton"], status["cuda"]) else "cpu"


def _jobs(args: argparse.Namespace) -> list[Job]:
    if args.what == "latency":
        return latency.jobs(args)
    if args.what == "overhead":
        return [Job(threads, args.budget, overhead=True) for threads in args.threads]
    device = args.device = _device(args.device)
    if args.graph and device == "cpu":
        raise UsageError("--graph: CUDA graphs are of work on a CUDA device")
    if args.batch is None:
        args.batch = list(shapes.BATCHES) if args.what != "main" else [128 if device == "cuda" else 8]
    threads = args.threads if device == "cpu" else [max(args.threads)]
    if args.what == "main":
        op, model = _cells(args, "op", ["fwd", "bwd"], device), _cells(args, "model", ["fwd"], device)
        block = _cells(args, "block", ["fwd", "train"], device)
        # Blocks on most threads only: the whole is to be done in a few minutes.
        return [Job(n, args.budget, [*op, *(block if n == max(threads) else []), *model]) for n in threads]
    modes = list(dict.fromkeys(_MODES[mode] for mode in args.mode))
    cells = _cells(args, args.what, modes, device)
    whole = [cell for cell in cells if cell.mode == "fwd"] if getattr(args, "stages", False) else []
    compared = _comparisons(args, modes, device) if getattr(args, "against", None) else []
    jobs = [Job(count, args.budget, cells, whole, against=compared) for count in threads]
    if getattr(args, "memory", False):
        steps = [mode for mode in modes if mode != "bwd"]
        jobs.append(Job(max(threads), args.budget, memory=_cells(args, args.what, steps, device)))
    return jobs


def _comparisons(args: argparse.Namespace, modes: Sequence[str], device: str) -> list[Against]:
    """Of --against: its variants of MambaOut join those of --variant."""
    variants, others = against.names(args.against)
    both = list(dict.fromkeys([*args.variant, *variants]))
    with_both = argparse.Namespace(**{**vars(args), "variant": both})
    return against.comparisons(_cells(with_both, "model", modes, device), others)


def _cells(args: argparse.Namespace, subject: str, modes: Sequence[str], device: str) -> list[Cell]:
    contenders = ["fused", "eager"] + ["naive"] * args.naive + ["compile"] * args.compile
    contenders += [name for name in args.also if name not in contenders]
    others = peers.installed() if getattr(args, "peers", False) and device == "cpu" else []
    found = []
    for mode, dtype, variant, batch in itertools.product(modes, args.dtype, args.variant, args.batch):
        try:
            stages = shapes.stages(variant, getattr(args, "stage", ()))
        except ValueError as error:
            raise UsageError(f"--stage: {error}") from None
        for shape in stages[:1] if subject == "model" else stages:
            autocast = subject != "op" and getattr(args, "autocast", False) and dtype in ("bf16", "fp16")
            names = [*contenders, *others] if mode == "fwd" else list(contenders)
            if mode == "fwd" and subject != "op" and not autocast:
                names.insert(1, "modules")
            found.append(
                Cell(
                    subject,
                    mode,
                    dtype,
                    batch,
                    shape,
                    tuple(dict.fromkeys(names)),
                    autocast,
                    args.input,
                    device,
                    args.graph,
                )
            )
    return found


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _show(args: argparse.Namespace, outcome: Outcome, warnings: Sequence[str]) -> None:
    about = machine.description()
    why = f" ({about['isa_reason']})" if about["isa_reason"] else ""
    isa = (
        f", {about['isa']} kernels{why}" if about["isa"] else ", no compiled kernels: fused runs the PyTorch reference"
    )
    device = about["gpu"] if getattr(args, "device", "cpu") != "cpu" and about["gpu"] else about["cpu"]
    print(f"{device}, {about['cores']} cores{isa}; torch {about['torch']}; commit {about['commit'] or 'unknown'}")
    title = (
        "minimum / median; vs: times that fused is faster, by medians; "
        "check: against fp64, and how far from eager, as a share of the largest value"
    )
    if getattr(args, "device", "cpu") == "cuda":
        title += "\nby CUDA events, TF32 off, operands not in the L2 cache"
    if peak := report_parts.peak_text(outcome.fma_peak):
        title += f"\n{peak}"
    show_table(title, *report.cells_table(outcome.rows))
    shares = "ms per image by medians, and share of the FMA peak: matrix products and convolutions over the time of all"
    show_table(shares, *report_parts.peak_table(outcome.rows))
    show_table("parts, by medians; of peak: as above", *report_parts.parts_table(outcome.rows))
    memory_title = "memory, and as a multiple of eager's; kept: for backward, or in mode fwd packed parameters"
    show_table(memory_title, *report.memory_table(outcome.rows))
    summary, memory_summary = report.summary(outcome.rows), report.memory_summary(outcome.rows)
    show_table("times that fused is faster, over all shapes and batches", *report.summary_table(summary))
    show_table("memory as a multiple of eager's, over all", *report.memory_summary_table(memory_summary))
    show_table("images per second, by medians", *report.throughput_table(outcome.rows))
    show_table("microseconds per call", *report.overhead_table(outcome.rows))
    latency.show(outcome.rows)
    against.show(getattr(args, "against", []), outcome.rows)
    wrong = report.red(outcome.rows)
    if wrong:
        print(f"WRONG: {len(wrong)} results are further from fp64 than allowed; they have no speed-up")
    if slower := report.slower_cells(outcome.rows):
        print(f"SLOWER: fused is slower than another in {len(slower)} comparisons:", *slower, sep="\n  ")
    if getattr(args, "peers", False) and (line := peers.left_out()) is not None:
        print(line)
    failed = [row for row in outcome.rows if "failure" in row and row["subject"] != "against"]
    for name, failure in sorted({(row["contender"], row["failure"]) for row in failed}):
        refused = failure.startswith(workloads.NOT_AVAILABLE)
        print(f"{workloads.CONTENDERS[name]} {'' if refused else 'failed: '}{failure}")
    for warning in warnings:
        print(f"warning: not a quiet machine: {warning}")
    if lines := report_parts.conclusions(outcome.rows):
        print(f"\nIn short, on {device}, {_threads(max(args.threads))}:", *lines, sep="\n  ")
        print(f"Next: {_NEXT[args.what]}")


def _write(args: argparse.Namespace, outcome: Outcome, settings: dict[str, Any], warnings: Sequence[str]) -> None:
    document = report.document(args.what, outcome, settings, warnings)
    json_file, csv_file, *plots = _files(args)
    written = [json_file, csv_file]
    with writing("--out", args.out):
        report.write_json(json_file, document)
        report.write_csv(csv_file, outcome.rows)
        about = document["machine"]
        hardware = f"{about['gpu'] or about['cpu']}, {about['cores']} cores"
        title = f"{hardware}, torch {about['torch']}, {document['created']}"
        written += [path for path in plots if _draw(path, outcome.rows, title)]
    print("written:", ", ".join(printable(str(path)) for path in written))


def _files(args: argparse.Namespace) -> list[Path]:
    """The JSON, the CSV, and the plots."""
    names = [f"{args.what}.json", f"{args.what}.csv"]
    if args.plot:
        names += [f"{args.what}.png"] + ["against.png"] * bool(getattr(args, "against", []))
    return [args.out / name for name in names]


def _draw(path: Path, rows: Sequence[Row], title: str) -> bool:
    if path.stem in _PLOTS:
        return _PLOTS[path.stem](path, rows, title)
    return plot.draw(path, report.timed_cells(rows), title)
