"""The kernels of csrc/cuda on the CPU: g++ compiles them with shim.h, and a program runs one call."""

import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from numerics import Inputs
from torch import Tensor

from mambaout_kernels.reference import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
KERNELS, HERE = ROOT / "csrc", Path(__file__).resolve().parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNITS = ("forward.cu", "backward.cu", "depthwise.cu", "gate_backward.cu", "weight_gradient.cu")  # of the op
FUSED, SPLIT = 1, 2  # ways through backward (cuda::BackwardPath)
TYPED_UNITS = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}

# What each way of building tells the compiler of csrc/cuda and of the shim. "races": the compiler calls watch.cpp at
# every access, and ThreadSanitizer's own library is not linked. "memory" compiles fast: checks by calls, not inline;
# what else C++ leaves undefined, and takes longer to compile, is in "undefined", which is nightly.
_MEMORY = (
    "-Og", "-fsanitize=address,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow",
    "-fno-sanitize-recover=all", "--param=asan-instrumentation-with-call-threshold=0",
)  # fmt: skip
_UNDEFINED = ("-Og", "-fsanitize=undefined", "-fno-sanitize-recover=all")
CHECKS = {
    "plain": (("-Og", "-fPIC"),) * 2,  # tests/cuda_binding links these objects into a library
    "memory": (_MEMORY,) * 2,
    "undefined": (_UNDEFINED,) * 2,
    "races": (("-Og", "-fsanitize=thread"), ("-O2",)),
}
SANITIZERS = ["memory", "races", pytest.param("undefined", marks=pytest.mark.nightly)]

CALLS: Counter[str] = Counter()  # of the kernels so far, by check; conftest.py reports them
_checks: dict[Path, str] = {}  # of programs


@dataclass(frozen=True)
class Schedule:
    """Order of threads: 0 as numbered, 1 reversed, 2 shuffled. error: of exp2 and 1 / x, in units of its bound."""

    order: int = 0
    late_copies: bool = False
    error: int = 0


@dataclass(frozen=True)
class Device:
    multiprocessors: int = 132
    major: int = 9


def cuda_headers() -> Path | None:
    """The folder of CUDA's own half types: of a toolkit, or of the runtime's wheel."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/include"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        folders.append(str(Path(nvcc).resolve().parents[1] / "include"))
    site_packages = Path(torch.__file__).parents[1]
    folders += [str(folder) for folder in site_packages.glob("nvidia/*/include")]
    for folder in map(Path, folders):
        if (folder / "cuda_bf16.h").exists() and (folder / "vector_functions.h").exists():
            return folder
    return None


def missing() -> str | None:
    """Why the kernels cannot be run on this machine's CPU; None where they can."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_headers() is None:
        return "no CUDA headers (a toolkit, or pip install nvidia-cuda-runtime)"
    return None


def built() -> Path:
    """The folder of what was built, kept from run to run."""
    folder = Path(tempfile.gettempdir()) / f"mambaout-cuda-host-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(sources: tuple[Path, ...], flags: tuple[str, ...], *headers_in: Path) -> Path:
    """The object file of sources of one folder, kept under the hash of all it is made of. headers_in: other folders.

    The sources are one translation unit: most of what the compiler reads is the same for all of them.
    """
    *before, last = map(str, sources)
    command = ["g++", "-x", "c++", "-c", "-std=c++20", "-g1", "-fno-omit-frame-pointer", "-ffp-contract=off", *flags]
    command += [word for source in before for word in ("-include", source)] + [last]
    folders = (sources[0].parent, HERE, KERNELS, *headers_in)
    headers = sorted(file for folder in folders for file in (*folder.glob("*.h"), *folder.glob("*.cuh")))
    digest = hashlib.sha256(" ".join(map(str, command)).encode())
    for file in (*sources, *headers):
        digest.update(file.read_bytes())
    target = built() / f"{sources[0].stem}-{digest.hexdigest()[:24]}.o"
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two files of tests want the same objects at the same time
        if not target.exists():
            unfinished = target.with_suffix(f".{os.getpid()}")
            done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            unfinished.replace(target)
    return target


def objects(
    check: str = "plain",
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    units: tuple[str, ...] = UNITS,
    kernels: Path = KERNELS / "cuda",
    callers: tuple[str, ...] = (),
) -> list[str]:
    """Object files of the shim and of the kernels of these dtypes and units; callers: sources beside the shim."""
    headers = cuda_headers()
    includes = (f"-isystem{headers}", f"-isystem{headers}/cccl", f"-I{HERE}", f"-I{KERNELS / 'cuda'}")
    for_kernels, for_shim = ((*flags, "-DMAMBAOUT_HOST_SHIM", *includes) for flags in CHECKS[check])
    jobs = [((HERE / f"{name}.cpp",), for_shim) for name in ("fibres", "watch", *callers)]
    jobs += [((kernels / "dispatch.cpp",), for_kernels)]
    sources = tuple(kernels / unit for unit in units)
    jobs += [(sources, (*for_kernels, f"-DMAMBAOUT_DTYPE={TYPED_UNITS[dtype]}")) for dtype in dtypes]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda job: str(compiled(*job)), jobs))


@cache
def build(
    check: str = "plain",
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES),
    units: tuple[str, ...] = UNITS,
    kernels: Path = KERNELS / "cuda",
    caller: str = "program",
) -> Path:
    """The program, with the kernels of these dtypes and units only. kernels: the folder of their sources."""
    linked = objects(check, dtypes, units, kernels, callers=(caller,))
    program = built() / f"program-{hashlib.sha256(' '.join(linked).encode()).hexdigest()[:24]}"
    if not program.exists():
        unfinished = program.with_suffix(f".{os.getpid()}")
        # dispatch.cpp names the units of every dtype and direction; those that are left out are never called.
        flags = ["-no-pie", *CHECKS[check][1], "-Wl,--unresolved-symbols=ignore-all"]
        link = ["g++", *flags, *linked, "-o", str(unfinished)]
        subprocess.run(link, check=True)
        unfinished.replace(program)
    _checks[program] = check
    return program


class Fault(AssertionError):
    """The program found something wrong, or did not survive it."""


def bytes_of(t: Tensor) -> bytes:
    return t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""


def spread(t: Tensor, pitch: int) -> bytes:
    """The pixels of a (N, H, W, channels) tensor `pitch` elements apart, NaN between them."""
    pixels, channels = t.shape[:3].numel(), t.shape[3]
    if pixels == 0:
        return b""
    wide = torch.full((pixels, pitch), torch.nan, dtype=t.dtype)
    wide[:, :channels] = t.reshape(pixels, channels)
    return bytes_of(wide.flatten()[: (pixels - 1) * pitch + channels])


def output_of(program: Path, stream: bytes) -> bytes:
    """What the program makes of its input. Fault where it found something wrong."""
    CALLS[_checks[program]] += 1
    done = subprocess.run([program], input=stream, capture_output=True)
    if done.returncode != 0:
        raise Fault(done.stderr.decode(errors="replace")[:4000] or f"ended with {done.returncode}")
    return done.stdout


def run(
    program: Path,
    inputs: Inputs,
    act: str,
    schedule: Schedule = Schedule(),
    device: Device = Device(),
    spare: tuple[int, int] = (0, 0),
    offset: tuple[int, int] = (0, 0),
    backward: bool = True,
    images_before: int = 0,
    last_blocks: int = 0,
    weight_offset: int = 0,
    path: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, du, dweight, dbias); all but y are NaN without backward.

    spare: elements between the pixels of u and of dy. offset, weight_offset: elements from an address that is a
    multiple of 16 bytes to the first. images_before: images of zeros that go before the inputs. last_blocks: only
    these of every launch are run; 0: all. path: FUSED, SPLIT, or 0, what the call itself chooses.
    """
    u, weight, bias = inputs
    N, H, W, D = inputs.dy.shape
    C, K = weight.shape[0], weight.shape[2]
    u_pitch, dy_pitch = 2 * D + spare[0], D + spare[1]
    call = struct.pack(
        "24q", N + images_before, H, W, D, C, K, ACTIVATIONS.index(act),
        DTYPES[u.dtype], DTYPES[weight.dtype], DTYPES[bias.dtype],
        u_pitch, dy_pitch, *offset, *astuple(device), *astuple(schedule), backward,
        images_before, last_blocks, weight_offset, path,
    )  # fmt: skip
    stream = call + spread(u, u_pitch) + spread(inputs.dy, dy_pitch) + bytes_of(weight) + bytes_of(bias)
    output = output_of(program, stream)
    results, at = [], 0
    for shape, dtype in (
        ((N, H, W, D), u.dtype), ((N, H, W, 2 * D), u.dtype), (weight.shape, weight.dtype), (bias.shape, bias.dtype),
    ):  # fmt: skip
        result = torch.empty(shape, dtype=dtype)
        size = result.numel() * result.element_size()
        if size:
            result = torch.frombuffer(bytearray(output[at : at + size]), dtype=dtype).reshape(shape)
        results.append(result)
        at += size
    assert at == len(output)
    return tuple(results)
