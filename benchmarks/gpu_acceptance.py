"""The day a GPU is there: correct on it? how fast, beside what was predicted? One command, one report, ten minutes.

    python benchmarks/gpu_acceptance.py            on the CUDA device (make gpu-acceptance)
    python benchmarks/gpu_acceptance.py --dry      the same steps on the CPU backends, small, to see that they run

Writes REPORT.md, results.json and plots to --out. A section that cannot be done is a finding, not the end of the
report. Exit status 1 where a result is wrong, a section failed or a sanitizer complains.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_acceptance_report import write
from torch import Tensor

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import machine, measure, report, shapes
from mambaout_kernels.benchmarking.measure import Row
from mambaout_kernels.benchmarking.workloads import Cell

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
DEPTHWISE_KERNELS = ("auto", "cudnn", "native")  # whose depthwise convolution PyTorch runs
SECTIONS = ("correctness", "behaviour", "sanitizer", "op", "block", "model", "depthwise")
SUBJECTS = ("op", "block", "model")  # the sections that are benchmarks


@dataclass
class Acceptance:
    device: str
    variant: str
    deadline: float
    budget_s: float  # of a timing
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def fail(self, what: str) -> None:
        self.failed = True
        self.notes.append(f"**FAILED**: {what}")

    def left(self) -> float:
        """Seconds until nothing more is begun."""
        return self.deadline - time.monotonic()

    @contextmanager
    def section(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is a finding, and the next section begins."""
        print(f"... {what}", file=sys.stderr, flush=True)
        try:
            yield
        except torch.OutOfMemoryError:
            self.left_out.append(f"{what}: out of memory")
        except Exception as error:
            self.fail(f"{what}: {type(error).__name__}: {str(error).strip()[:500]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_acceptance"))
    parser.add_argument("--dry", action="store_true", help="on the CPU backends, small")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="this section; may be given more than once")
    parser.add_argument("--variant", choices=shapes.variants(), default=shapes.variants()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="nothing is begun after nine tenths of them")
    args = parser.parse_args(arguments)
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs the same steps on the CPU")
    started = time.monotonic()
    run = Acceptance(
        "cpu" if args.dry else "cuda", args.variant, started + 54 * args.minutes, 0.05 if args.dry else 0.3
    )
    wanted = args.only or SECTIONS
    bandwidth = None
    usable = usable_backends(run)
    for backend in usable:
        if "correctness" in wanted:
            with run.section(f"correctness of {backend}"):
                check(run, backend)
        if "behaviour" in wanted:
            with run.section(f"behaviour of {backend}"):
                behaviour(run, backend)
    if "sanitizer" in wanted:
        with run.section("compute-sanitizer"):
            sanitize(run)
    if set(wanted) & {*SUBJECTS, "depthwise"}:
        with run.section("bandwidth"):
            bandwidth = copy_bandwidth(run.device)
    for subject in SUBJECTS:
        for backend in usable if subject in wanted else ():
            with run.section(f"{subject} on {backend}"), backends.force(backend):
                for cell in cells(run, subject, with_compile=backend == usable[0]):
                    time_cell(run, cell, backend)
    if "depthwise" in wanted:
        with run.section("PyTorch's depthwise kernels"):
            sweep_depthwise_kernels(run)

    seconds = time.monotonic() - started
    write(args.out, machine.description(), run.dry, run.notes, run.left_out, run.rows, bandwidth, seconds)
    print((args.out / "REPORT.md").read_text(encoding="utf-8"))
    return 1 if run.failed else 0


def usable_backends(run: Acceptance) -> list[str]:
    """The backends for the device that can be used here; the others are noted with the reason."""
    wanted = ("cpu",) if run.dry else ("triton", "cuda")
    status = backends.status()
    for name in wanted:
        if status[name] is None:
            run.notes.append(f"backend {name}: usable")
        else:
            run.fail(f"backend {name} cannot be used here: {status[name]}")
    return [name for name in wanted if status[name] is None]


def check(run: Acceptance, backend: str) -> None:
    """`mambaout-kernels check`: forward and every gradient against fp64."""
    command = [sys.executable, "-m", "mambaout_kernels", "check", "--backend", backend, "--json"]
    command += ["--dtype", "fp32"] if run.dry else ["--full", "--dtype", "fp32,bf16,fp16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, run.left()))
    try:
        findings = json.loads(done.stdout)["findings"]
    except (json.JSONDecodeError, KeyError):
        run.fail(f"check of {backend} did not finish: {done.stderr.strip()[-500:]}")
        return
    wrong = [finding for finding in findings if not finding["passed"]]
    if done.returncode != 0 or wrong:
        run.fail(f"check of {backend}: {len(wrong)} of {len(findings)} findings are wrong")
    else:
        run.notes.append(f"check of {backend}: {len(findings)} findings, all within the tolerance")


def behaviour(run: Acceptance, backend: str) -> None:
    """The same bits again; on CUDA also from another stream, out of a graph, and on every other device."""
    module = backends.load(backend)

    def inputs(device: str) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        sizes = ((2, 9, 11, 80), (24, 1, 7, 7), (24,), (2, 9, 11, 40))
        return tuple(torch.randn(size, generator=generator).to(device) for size in sizes)

    def results(u: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
        y = module.gated_dwconv(u, weight, bias, "gelu")
        return [y, *module.gated_dwconv_backward(dy, u, weight, bias, "gelu")]

    tensors = inputs(run.device)
    first = results(*tensors)

    def compare(what: str, again: list[Tensor]) -> None:
        same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, again, strict=True))
        if same:
            run.notes.append(f"{backend}, {what}: the same bits")
        else:
            run.fail(f"{backend}, {what}: other bits than in the first run")

    compare("a second run", results(*tensors))
    if run.dry:
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = results(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    compare("another stream", again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(*tensors)
    graph.replay()
    torch.cuda.synchronize()
    compare("a CUDA graph", captured)
    for index in range(1, torch.cuda.device_count()):
        compare(f"device {index} while another is current", results(*inputs(f"cuda:{index}")))


def sanitize(run: Acceptance) -> None:
    """The compiled kernels under compute-sanitizer, where it is installed; Triton's allocate as PyTorch does."""
    program = shutil.which("compute-sanitizer")
    if program is None or run.dry or backends.status()["cuda"] is not None:
        reason = "a dry run" if run.dry else "not installed" if program is None else "no CUDA module"
        run.notes.append(f"compute-sanitizer: left out ({reason})")
        return
    call = (
        "import torch; from mambaout_kernels.backends import cuda\n"
        "for D, C, dtype in ((40, 24, torch.float32), (41, 17, torch.bfloat16)):\n"
        "    u, dy = (torch.randn(2, 9, 11, n, device='cuda').to(dtype) for n in (2 * D, D))\n"
        "    p = torch.randn(C, 1, 7, 7, device='cuda'), torch.randn(C, device='cuda')\n"
        "    cuda.gated_dwconv(u, *p, 'gelu'); cuda.gated_dwconv_backward(dy, u, *p, 'gelu')\n"
        "torch.cuda.synchronize()"
    )
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation
    for tool in SANITIZERS:
        if run.left() < 0:
            run.left_out.append(f"compute-sanitizer {tool}")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-name", "kernel_substring=mambaout"]
        try:
            done = subprocess.run(
                [*command, sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=60
            )
        except subprocess.TimeoutExpired:
            run.left_out.append(f"compute-sanitizer {tool}: over a minute")
            continue
        if done.returncode == 0:
            run.notes.append(f"compute-sanitizer {tool}: no errors")
        else:
            run.fail(f"compute-sanitizer {tool}: {(done.stdout + done.stderr).strip()[-500:]}")


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a large copy: the best of several."""
    source = torch.zeros(1 << (28 if device == "cuda" else 25), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def cells(run: Acceptance, subject: str, with_compile: bool) -> Iterator[Cell]:
    """The op in full, the block and the model at their ends; torch.compile, slow to build, only at the large batch."""
    stages = shapes.stages(run.variant, [4] if run.dry else [])
    batches = (1,) if run.dry else (1, 128)
    modes = ("fwd", "bwd") if subject == "op" else ("fwd", "train")
    if subject == "block":
        stages = list(dict.fromkeys((stages[0], stages[-1])))
    if subject == "model":
        stages, batches = stages[:1], batches[-1:]
    for dtype in ("fp32",) if run.dry else ("bf16", "fp32"):
        for batch in batches:
            for shape in stages:
                for mode in modes:
                    compiled = with_compile and not run.dry and batch > 1 and dtype == "bf16" and mode == "fwd"
                    contenders = ("fused", "eager", "naive", *(("compile",) if compiled else ()))
                    yield Cell(subject, mode, dtype, batch, shape, contenders, device=run.device)


def time_cell(run: Acceptance, cell: Cell, name: str) -> None:
    label = f"{name}: {cell.subject} {cell.mode} {cell.label} {cell.dtype} batch {cell.batch}"
    if run.left() < 0:
        run.left_out.append(label)
        return
    with run.section(label):
        for row in measure.time_cell(cell, torch.get_num_threads(), run.budget_s, measure.Watch()):
            if row.get("check") is False:
                run.fail(f"{label}: {report.check_text(row)}")
            run.rows.append({**row, "run_on": name})


def sweep_depthwise_kernels(run: Acceptance) -> None:
    """Eager and torch.compile of the op with every choice of depthwise kernel, where this torch has the choice."""
    if run.dry or not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        reason = "a dry run" if run.dry else "this torch has no choice of it"
        run.notes.append(f"depthwise kernel of PyTorch: left out ({reason})")
        return
    for name in DEPTHWISE_KERNELS:
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel=name):
            for shape in shapes.stages(run.variant):
                cell = Cell("op", "fwd", "bf16", 128, shape, ("eager", "compile"), device="cuda")
                time_cell(run, cell, f"PyTorch, depthwise kernel {name}")


if __name__ == "__main__":
    raise SystemExit(main())
