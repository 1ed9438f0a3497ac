"""The sections of gpu_acceptance.py: each yields what it finds, (kind, content), as it finds it.

Kinds: fact, note, fail, left_out, row (of times, as `mambaout-kernels bench` has them), counters, clocks, took. Only
the standard library is imported here: sections begin before anything is built.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Found = Iterator[tuple[str, dict[str, Any]]]
DTYPES = ("bf16", "fp32", "fp16")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
BATCH = 128
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


@dataclass(frozen=True)
class Settings:
    out: Path
    variant: str
    dry: bool
    until: float  # time.time() at which nothing more is begun
    commit: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def log(self) -> Path:
        return self.out / "log.txt"

    def left(self) -> float:
        return self.until - time.time()

    def record(self, section: str, kind: str, **content: Any) -> None:
        """A line of results.jsonl, on the disk before this returns; several processes may write."""
        line = json.dumps({"section": section, "kind": kind, **_finite(content)}, allow_nan=False)
        with self.results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Section:
    run: Callable[[Settings], Found]
    limit_s: float
    beside: bool = False  # may run while others do: nothing in it is timed


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _output(*command: str) -> str:
    """What it prints; "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def facts(settings: Settings) -> Found:
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "commit": settings.commit}
    found["nvcc"] = (_output("nvcc", "--version").splitlines() or [None])[-1]
    for name in ("triton", "timm"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if not settings.dry:
        properties = torch.cuda.get_device_properties()
        found |= {"card": properties.name, "compute capability": f"{properties.major}.{properties.minor}"}
        found |= {"multiprocessors": properties.multi_processor_count, "L2, MiB": properties.L2_cache_size / 2**20}
        query = "driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"
        found["nvidia-smi"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    yield "fact", found


def clocks(settings: Settings) -> Found:
    """Of now, beside the times that follow."""
    if not settings.dry:
        yield "clocks", {"text": _output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")}


def build(settings: Settings) -> Found:
    """The modules, into the package, for this card alone. What is built already stays, where sources did not change."""
    import pybind11
    import torch

    folder = ROOT / "build" / "gpu"
    major, minor = (9, 0) if settings.dry else torch.cuda.get_device_capability()
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", **os.environ, "PATH": path}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DMAMBAOUT_CUDA={'AUTO' if settings.dry else 'ON'}"]
    into = ROOT / "mambaout_kernels"
    if settings.dry and any(into.glob("_C*.so")):  # a checkout's own build stays
        into = folder / "installed"
    started = time.time()
    for step in (
        configure,
        ["cmake", "--build", str(folder)],
        ["cmake", "--install", str(folder), "--prefix", str(into)],
    ):
        done = subprocess.run(step, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            yield "fail", {"text": f"{' '.join(step[:2])}: {done.stdout[-3000:]}"}
            return
    yield "note", {"text": f"built for {major}.{minor} in {time.time() - started:.0f} s"}
    ask = "import json; from mambaout_kernels import backends; print(json.dumps(backends.status()))"
    status = json.loads(_output(sys.executable, "-c", ask) or "{}")
    for name in ("cpu",) if settings.dry else ("cpu", "triton", "cuda"):
        if status.get(name, "no answer") is None:
            yield "note", {"text": f"backend {name}: usable"}
        else:
            yield "fail", {"text": f"backend {name} cannot be used: {status.get(name, 'no answer')}"}


def check(settings: Settings, backend: str, dtype: str) -> Found:
    """`mambaout-kernels check`: forward and every gradient against fp64."""
    command = [sys.executable, "-m", "mambaout_kernels", "check", "--json", "--dtype", dtype]
    command += ["--backend", "cpu" if settings.dry else backend, "--variant", settings.variant]
    done = subprocess.run([*command, *([] if settings.dry else ["--full"])], capture_output=True, text=True)
    try:
        content = json.loads(done.stdout)
    except json.JSONDecodeError:
        yield "fail", {"text": f"check of {backend}, {dtype}: {done.stderr.strip()[-1000:]}"}
        return
    findings = content["findings"] + content.get("special_values", [])
    wrong = [f for f in findings if not f.get("passed", not str(f.get("outcome")).startswith("FAILED"))]
    if wrong or done.returncode:
        shown = "; ".join(json.dumps(finding) for finding in wrong[:3])
        yield "fail", {"text": f"check of {backend}, {dtype}: {len(wrong)} of {len(findings)} are wrong: {shown}"}
    else:
        yield "note", {"text": f"check of {backend}, {dtype}: {len(findings)} findings, none wrong"}


def behaviour(settings: Settings, backend: str) -> Found:
    import gpu_behaviour

    yield from gpu_behaviour.examine("cpu" if settings.dry else backend, settings.device)


def split_block(settings: Settings, dtype: str) -> Found:
    """The block in inference, whose kernels are Triton's and take a while to compile."""
    if settings.dry:
        yield "left_out", {"text": "split block: a dry run; make test has it in Triton's interpreter"}
        return
    import gpu_split_block

    from mambaout_kernels.benchmarking import workloads

    yield from gpu_split_block.examine(settings.device, workloads.DTYPES[dtype])


def scan(settings: Settings, dtype: str) -> Found:
    import gpu_scan

    from mambaout_kernels.benchmarking import workloads

    yield from gpu_scan.examine(settings.device, workloads.DTYPES[dtype], settings.dry)


def mixers(settings: Settings) -> Found:
    import gpu_scan

    yield from gpu_scan.mixers(settings.device, "fp32" if settings.dry else "bf16", settings.dry)


def tests(settings: Settings) -> Found:
    """Those of `make test` that only a GPU can run."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("precision", "complaints")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "cuda or graph"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-500:]])[-1]
    if done.returncode == 0:
        yield "note", {"text": f"tests that need a GPU: {last}"}
    else:
        yield "fail", {"text": f"tests that need a GPU: {done.stdout[-2000:]} {done.stderr[-500:]}"}


def sanitize(settings: Settings, tool: str) -> Found:
    """The compiled kernels under compute-sanitizer, as models call them: bf16 and aligned, at every stage; and odd."""
    program = shutil.which("compute-sanitizer")
    if settings.dry or program is None:
        reason = "a dry run" if settings.dry else "not installed"
        yield "left_out", {"text": f"compute-sanitizer {tool}: {reason}"}
        return
    command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-name", "kernel_substring=mambaout"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor its own allocation
    done = subprocess.run(
        [*command, sys.executable, str(ROOT / "benchmarks" / "gpu_behaviour.py"), "all"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 0:
        yield "note", {"text": f"compute-sanitizer {tool}: no errors"}
    else:
        text = done.stdout + done.stderr
        yield "fail", {"text": f"compute-sanitizer {tool}: {text[:3000]} ... {text[-1000:]}"}


def bandwidth(settings: Settings) -> Found:
    """Bytes per second, read and written, of a large copy: the best of several."""
    import torch

    from mambaout_kernels.benchmarking import timing

    stopwatch = timing.by_host() if settings.dry else timing.by_cuda_events()
    source = torch.zeros(1 << (22 if settings.dry else 28), device=settings.device)
    target = torch.empty_like(source)
    seconds = min(stopwatch(lambda: target.copy_(source)) for _ in range(20))
    yield "fact", {"bandwidth": 2 * source.numel() * source.element_size() / seconds}


OP = ("cuda", "triton", "eager", "naive", "compile")


def times(
    settings: Settings, subject: str, dtype: str, batch: int = BATCH, contenders: tuple[str, ...] = OP,
    modes: tuple[str, ...] | None = None, stages: tuple[int, ...] = (), variant: str | None = None,
    autocast: bool = False, graph: bool = False, verify: bool = True,
) -> Found:  # fmt: skip
    """Rows of times, cell by cell, every contender in turns with the others."""
    import torch

    from mambaout_kernels.benchmarking import measure, shapes
    from mambaout_kernels.benchmarking.workloads import Cell

    variant = variant or settings.variant
    if settings.dry:  # what a CPU can do in seconds
        contenders = ("fused", *(name for name in contenders if name in ("eager", "naive", "timm")))
        variant, batch, stages, graph = "test_mambaout", 1, (4,), False
    of_stages = shapes.stages(variant, stages)
    yield from clocks(settings)
    for mode in modes or (("fwd", "bwd") if subject == "op" else ("fwd", "train")):
        for shape in of_stages[:1] if subject == "model" else of_stages:
            what = f"{subject} {mode} {shape.variant} {shape.label} {dtype} batch {batch}"
            if settings.left() < 0:
                yield "left_out", {"text": f"{what}: no time"}
                continue
            cell = Cell(subject, mode, dtype, batch, shape, contenders, autocast, "random", settings.device, graph)
            try:
                budget = 0.05 if settings.dry else 0.5
                for row in measure.time_cell(cell, torch.get_num_threads(), budget, measure.Watch(), verify=verify):
                    yield "row", row
            except torch.OutOfMemoryError:
                yield "left_out", {"text": f"{what}: out of memory"}
            except Exception as error:
                where = "".join(traceback.format_exception(error)[-4:])
                yield "fail", {"text": f"{what}: {type(error).__name__}: {where[-1500:]}"}
    yield from clocks(settings)


def memory(settings: Settings) -> Found:
    """Of a training step: kept for backward, and at the peak."""
    import torch

    from mambaout_kernels.benchmarking import measure, shapes
    from mambaout_kernels.benchmarking.workloads import Cell

    variant, batch = ("test_mambaout", 1) if settings.dry else (settings.variant, BATCH)
    shape = shapes.stages(variant)[0]
    cell = Cell("model", "train", "bf16", batch, shape, ("fused", "eager"), True, "random", settings.device)
    for row in measure.memory_cell(cell, torch.get_num_threads()):
        yield "row", row


def depthwise(settings: Settings) -> Found:
    """Eager with every choice of depthwise kernel, where this torch has the choice."""
    import torch

    if settings.dry or not hasattr(torch.backends.cudnn, "depthwise_kernel"):
        yield "left_out", {"text": "depthwise kernels of PyTorch: " + ("a dry run" if settings.dry else "no choice")}
        return
    for kernel in ("auto", "cudnn", "native"):
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel=kernel):
            for kind, content in times(settings, "op", "bf16", contenders=("eager",), modes=("fwd",)):
                yield kind, {**content, "depthwise_kernel": kernel}


def counters(settings: Settings) -> Found:
    """Hardware counters of the CUDA C++ kernels at every stage, by ncu, whose clocks are left alone."""
    import gpu_counters

    program = shutil.which("ncu")
    if settings.dry or program is None:
        yield "left_out", {"text": f"hardware counters: {'a dry run' if settings.dry else 'no ncu'}"}
        return
    for stage in range(1, 5):
        done = subprocess.run(gpu_counters.command(program, stage), capture_output=True, text=True)
        kernels = gpu_counters.parse(done.stdout)
        if not kernels:
            yield "fail", {"text": f"ncu, stage {stage}: {(done.stdout + done.stderr)[-1500:]}"}
        for kernel in kernels:
            yield "counters", {"stage": stage, **kernel}


def kernels(
    settings: Settings, subject: str, mode: str, contenders: tuple[str, ...], variant: str = "mambaout_tiny"
) -> Found:
    """Which kernels the time is made of, in bf16 at batch 128."""
    import gpu_kernels

    from mambaout_kernels.benchmarking import shapes, workloads

    if settings.dry:
        yield "left_out", {"text": f"kernels of {subject} {mode}: a dry run"}
        return
    stages = shapes.stages(variant)
    for shape in stages[:1] if subject == "model" else stages:
        cell = workloads.Cell(subject, mode, "bf16", BATCH, shape, contenders, device=settings.device)
        workload = workloads.build(cell)
        for contender in workload.contenders:
            what = {"subject": subject, "mode": mode, "label": cell.label, "contender": contender.name}
            yield "kernels", {**what, **gpu_kernels.profile(contender)}
        if workload.failures:
            yield "fail", {"text": f"kernels of {subject} {mode} {cell.label}: {workload.failures}"}


INFERENCE = (
    "fused",
    "fused-graphs",
    "modules",
    "compile-fused",
    "eager",
    "naive",
    "timm",
    "timm-channels-last",
    "timm-compile",
    "timm-reduce-overhead",
)
TRAINING = ("fused", "compile-fused", "eager", "timm", "timm-compile")
BLOCK = ("fused", "modules", "cuda", "triton", "compile-fused", "eager", "naive", "compile")


def ahead(settings: Settings, mode: str, dtype: str, variant: str, autocast: bool) -> Found:
    """Compiles what `model` times, which the compilers keep on the disk, and verifies it: minutes of the host's time,
    in which others can do the same."""
    from mambaout_kernels.benchmarking import accuracy, shapes, workloads

    contenders = INFERENCE if mode == "fwd" else TRAINING
    if settings.dry:
        variant, contenders = "test_mambaout", ("fused",)
    shape = shapes.stages(variant)[0]
    batch = 1 if settings.dry else BATCH
    cell = workloads.Cell(
        "model", mode, dtype, batch, shape, tuple(name for name in contenders if "compile" in name or "reduce" in name),
        autocast, "random", settings.device,
    )  # fmt: skip
    workload = workloads.build(cell)
    for contender in workload.contenders:
        with contender.context():
            contender.run(contender.prepare())
    what = f"model {mode} {variant} {dtype}{', AMP' if autocast else ''}"
    yield "note", {"text": f"{what}: compiled {len(workload.contenders)}, not {workload.failures}"}
    for name in contenders:
        if name not in workloads.OWN or (name == "fused-graphs" and autocast):
            continue
        found = accuracy.worst(workloads.verify(cell, name))
        yield ("note" if found.passed else "fail"), {"text": f"{what}, {name}: {found}"}


def model(settings: Settings, dtype: str, variant: str, autocast: bool) -> Found:
    how: dict[str, Any] = {"dtype": dtype, "variant": variant, "autocast": autocast, "verify": False}  # `ahead` did
    inference = tuple(name for name in INFERENCE if not (autocast and name == "fused-graphs"))  # which it is not for
    yield from times(settings, "model", contenders=inference, modes=("fwd",), **how)
    yield from times(settings, "model", contenders=TRAINING, modes=("train",), **how)


def replayed_model(settings: Settings) -> Found:
    """One image and eight, where the host's time is most of it: as they are, and as CUDA graphs."""
    for batch in (1, 8):
        for graph in (False, True):
            plain = ("fused", "fused-graphs", "compile-fused", "eager", "timm-compile", "timm-reduce-overhead")
            contenders = ("fused", "eager", "timm") if graph else plain
            yield from times(settings, "model", "bf16", batch, contenders, ("fwd",), graph=graph)


TINY, BASE = "mambaout_tiny", "mambaout_base"
PRECISIONS = {"amp": ("bf16", True), "bf16": ("bf16", False), "fp32": ("fp32", False)}
WAIT = "wait"  # in a plan: until what runs beside others has ended
SECTIONS: dict[str, Section] = {
    "facts": Section(facts, 60),
    "build": Section(build, 300),
    **{
        f"check-{backend}-{dtype}": Section(partial(check, backend=backend, dtype=dtype), 400, backend == "triton")
        for backend in ("cuda", "triton")
        for dtype in DTYPES
    },
    "behaviour-cuda": Section(partial(behaviour, backend="cuda"), 120),
    "behaviour-triton": Section(partial(behaviour, backend="triton"), 180, True),
    **{f"split-block-{dtype}": Section(partial(split_block, dtype=dtype), 300, True) for dtype in DTYPES},
    "tests": Section(tests, 120, True),
    **{tool: Section(partial(sanitize, tool=tool), 120) for tool in SANITIZERS},
    "bandwidth": Section(bandwidth, 30),
    "op-bf16": Section(partial(times, subject="op", dtype="bf16", contenders=(*OP, "cudnn-benchmark")), 240),
    "op-fp32": Section(partial(times, subject="op", dtype="fp32"), 200),
    "op-base": Section(partial(times, subject="op", dtype="bf16", variant=BASE), 200),
    "op-autotune": Section(
        partial(times, subject="op", dtype="bf16", contenders=("cuda", "eager", "max-autotune"), stages=(1, 3)), 150
    ),
    "op-fp16": Section(partial(times, subject="op", dtype="fp16", stages=(2,)), 60),
    "op-64": Section(partial(times, subject="op", dtype="bf16", batch=64, contenders=("cuda", "triton", "eager")), 60),
    "op-1": Section(
        partial(times, subject="op", dtype="bf16", batch=1, contenders=("cuda", "triton", "eager"), graph=True), 60
    ),
    "counters": Section(counters, 150),
    "depthwise": Section(depthwise, 60),
    "block": Section(partial(times, subject="block", dtype="bf16", contenders=BLOCK), 200),
    "block-base": Section(partial(times, subject="block", dtype="bf16", contenders=BLOCK, variant=BASE), 200),
    "block-inference": Section(
        partial(times, subject="block", dtype="bf16", contenders=("fused", "modules", "compile"), modes=("fwd",)), 90
    ),
    **{
        f"model-{variant.removeprefix('mambaout_')}-{name}": Section(
            partial(model, dtype=dtype, variant=variant, autocast=autocast), 240
        )
        for name, (dtype, autocast) in PRECISIONS.items()
        for variant in (TINY, BASE)
    },
    **{
        f"ahead-{mode}-{variant.removeprefix('mambaout_')}-{name}": Section(
            partial(ahead, mode=mode, dtype=dtype, variant=variant, autocast=autocast), 280, True
        )
        for name, (dtype, autocast) in PRECISIONS.items()
        for variant in (TINY, BASE)
        for mode in ("fwd", "train")
    },
    "model-small-batch": Section(replayed_model, 120),
    "kernels-op": Section(
        lambda settings: (
            found for mode in ("fwd", "bwd") for found in kernels(settings, "op", mode, ("cuda", "triton"))
        ),
        90,
    ),
    **{
        f"kernels-{mode}-{variant.removeprefix('mambaout_')}": Section(
            partial(kernels, subject="model", mode=mode, contenders=(contender, "timm-compile"), variant=variant), 120
        )
        for mode, contender in (("fwd", "fused-graphs"), ("train", "compile-fused"))
        for variant in (TINY, BASE)
    },
    "memory": Section(memory, 60),
    **{f"scan-{dtype}": Section(partial(scan, dtype=dtype), 120) for dtype in DTYPES},
    "mixers": Section(mixers, 180),
}
PLANS: dict[str, tuple[str, ...]] = {
    "A": ("facts", "build", "check-triton-bf16", "check-triton-fp32", "check-triton-fp16", "check-cuda-bf16",
          "split-block-bf16", "split-block-fp16", "split-block-fp32", "check-cuda-fp32", "behaviour-cuda",
          "check-cuda-fp16", *SANITIZERS, "behaviour-triton", "tests"),
    "B": ("facts", "build", "bandwidth", "op-bf16", "counters", "op-fp32", "op-1", "op-base", "op-64", "op-autotune",
          "op-fp16", "depthwise"),
    "C": ("facts", "build", "ahead-train-tiny-bf16", "ahead-train-tiny-amp", "ahead-fwd-tiny-bf16",
          "ahead-fwd-tiny-amp", WAIT, "bandwidth", "model-tiny-bf16", "model-tiny-amp", "kernels-train-tiny",
          "model-small-batch", "kernels-fwd-tiny", "memory", "kernels-op"),
    "D": ("facts", "build", "ahead-train-base-bf16", "ahead-train-base-amp", "ahead-fwd-base-bf16",
          "ahead-fwd-base-amp", WAIT, "bandwidth", "model-base-bf16", "model-base-amp", "kernels-train-base",
          "kernels-fwd-base"),
    "E": ("facts", "build", "ahead-train-tiny-fp32", "ahead-train-base-fp32", "ahead-fwd-tiny-fp32",
          "ahead-fwd-base-fp32", WAIT, "bandwidth", "model-tiny-fp32", "model-base-fp32", "block-inference", "block",
          "block-base"),
    "F": ("facts", "build", "scan-bf16", "scan-fp32", "scan-fp16", "mixers"),
}  # fmt: skip
