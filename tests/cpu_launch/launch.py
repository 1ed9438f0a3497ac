"""The launch interface of csrc/cpu without torch: builds program.cpp, plain or under sanitizers, and calls it."""

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from numerics import Inputs
from torch import Tensor

from mambaout_kernels.reference import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3, "amx_bf16": 4}
PARAMETERS = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "conv_weight", "conv_bias", "fc2_weight",
              "fc2_bias", "scale")  # fmt: skip

# Cheap to compile: checks by calls, not inline; a null pointer and the end of an object are AddressSanitizer's as well.
_SANITIZED = "-g1 -fno-omit-frame-pointer -fno-sanitize-recover=all"
_ADDRESS = f"{_SANITIZED} -Og -fsanitize=address --param asan-instrumentation-with-call-threshold=0"
_UNDEFINED = "-fsanitize=undefined,float-cast-overflow -fno-sanitize=null,object-size"
_RACES = f"{_SANITIZED} -O1 -fsanitize=thread"
# "plain" has the flags of the module, and guard pages around every buffer. "amx" is for the unit of AMX, with tile
# instructions in C++. AddressSanitizer alone compiles in half of the time.
FLAGS = {
    "plain": None, "memory": f"{_ADDRESS} {_UNDEFINED}", "races": _RACES,
    "amx-memory": _ADDRESS, "amx-undefined": f"{_SANITIZED} -Og {_UNDEFINED}", "amx-races": _RACES,
}  # fmt: skip


USUAL = ("plain", "amx-memory")  # in make test; the others are for make sanitize


def kinds(on_amx: bool) -> list:
    """The parameters of a test. on_amx: whether the unit of AMX has kernels for it."""
    of_test = [kind for kind in FLAGS if on_amx or not kind.startswith("amx")]
    return [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.sanitize) for kind in of_test]


def isas_of(kind: str, of_module: list[str]) -> list[str]:
    return ["amx_bf16"] if kind.startswith("amx") else of_module


def missing() -> str | None:
    """Why the program cannot be built here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "guard pages and sanitizers are used on Linux"
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("cmake", path=_path()) is None:
        return "no C++ compiler or no cmake"
    return None


def _path() -> str:
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def build(kind: str) -> Path:
    """The program, kept in build/ from run to run; plain, from the objects of the module where they are there."""
    path, failure = _built(kind)
    assert not failure, failure
    return path


@cache
def _built(kind: str) -> tuple[Path, str]:
    """Where it is, and what the build said if it failed: once, not in every test."""
    flags = FLAGS[kind]
    of_module = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    reused = flags is None and (of_module / "build.ninja").exists()
    folder = of_module if reused else ROOT / "build" / f"cpu_launch-{kind}"
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DMAMBAOUT_PYTHON_MODULE=OFF"]
    if flags is not None:
        # A build type of its own: CMakeLists.txt sets the flags of Release, whatever is asked for here.
        configure += ["-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS_SANITIZED={flags}"]
    if kind.startswith("amx"):
        configure.append("-DMAMBAOUT_EMULATED_AMX=ON")
    commands = [] if reused else [configure]
    for command in (*commands, ["cmake", "--build", folder, "--target", "cpu_launch"]):
        done = subprocess.run(command, env={**os.environ, "PATH": _path()}, capture_output=True, text=True)
        if done.returncode != 0:
            return folder, done.stdout + done.stderr
    return folder / "cpu_launch", ""


class Fault(AssertionError):
    """The program found something wrong, or did not survive it."""


@dataclass(frozen=True)
class Where:
    """How a call is launched. at_begin: buffers begin at a guard page instead of ending at one."""

    isa: str = "portable"
    threads: int = 1
    at_begin: bool = False


def _bytes(t: Tensor | None) -> bytes:
    """Length, then data: everything from the first to the last element of a view, NaN where the view is not."""
    if t is None or t.numel() == 0:
        return struct.pack("q", 0)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    storage = torch.full((span,), torch.nan if t.is_floating_point() else 0, dtype=t.dtype)
    once = t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]
    storage.as_strided(once.shape, once.stride()).copy_(once)
    data = storage.view(torch.uint8).numpy().tobytes()
    return struct.pack("q", len(data)) + data


def _take(data: bytes, like: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    found, at = [], 0
    for shape, dtype in like:
        result = torch.empty(shape, dtype=dtype)
        size = result.numel() * result.element_size()
        if size:
            result = torch.frombuffer(bytearray(data[at : at + size]), dtype=dtype).reshape(shape)
        found.append(result)
        at += size
    return found


class Program:
    """A running program, which takes one call after the other; a new one is started after a fault."""

    def __init__(self, kind: str) -> None:
        self._path = build(kind)
        self._running: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Waits for the end, which for a sanitizer is when it reports leaks."""
        if self._running is not None:
            self._running.stdin.close()
            code = self._running.wait()
            if code != 0:
                self._fail(code)
            self._log.close()
            self._running = None

    def _fail(self, code: int) -> None:
        self._running = None
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        self._log.close()
        raise Fault(f"ended with {code}: {said[:6000]}")

    def _call(self, header: bytes, tensors: bytes, like: list[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        if self._running is None:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the program runs)
            self._running = subprocess.Popen(
                [self._path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        expected = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in like)
        try:
            self._running.stdin.write(header + tensors)
            self._running.stdin.flush()
            answer = self._running.stdout.read(expected + 8)
        except BrokenPipeError:
            answer = b""
        if len(answer) != expected + 8:
            self._running.stdout.close()
            self._fail(self._running.wait())
        assert answer[expected:] == b"finished"
        return _take(answer, like)

    def op(
        self, inputs: Inputs, act: str, where: Where, stride_n: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, du, dweight, dbias), for any strides whose last is 1. stride_n: a wrong one of u, to see it caught."""
        u, weight, bias, dy = inputs.u, inputs.weight.contiguous(), inputs.bias, inputs.dy
        (N, H, W, D), (C, K) = dy.shape, (weight.shape[0], weight.shape[2])
        strides = (u.stride(0) if stride_n is None else stride_n, *u.stride()[1:3])
        common = (N, H, W, D, C, K, ACTIVATIONS.index(act), *(DTYPES[t.dtype] for t in (u, weight, bias)))

        def header(kind: int) -> bytes:
            place = (kind, ISAS[where.isa], where.threads, where.at_begin)
            return struct.pack("16qd6q", *place, *common, 0, 0, 0.0, *strides, *dy.stride()[:3])

        given = _bytes(u) + _bytes(weight) + _bytes(bias)
        y = self._call(header(0), given, [(dy.shape, u.dtype)])
        gradients = [(u.shape, u.dtype), (weight.shape, weight.dtype), (bias.shape, bias.dtype)]
        return (*y, *self._call(header(1), given + _bytes(dy), gradients))

    def block(
        self, x: Tensor, parameters: dict[str, Tensor | None], act: str, eps: float, low_precision: bool, where: Where
    ) -> Tensor:
        """The whole block; the parameters (PARAMETERS) in float32."""
        conv, fc1, fc2 = parameters["conv_weight"], parameters["fc1_weight"], parameters["fc2_weight"]
        header = struct.pack(
            "16qd6q", 2, ISAS[where.isa], where.threads, where.at_begin, *x.shape[:3], fc2.shape[1], conv.shape[0],
            conv.shape[2], ACTIVATIONS.index(act), DTYPES[x.dtype], 0, 0, fc2.shape[0], int(low_precision), eps,
            *x.stride()[:3], 0, 0, 0,
        )  # fmt: skip
        assert fc1.shape == (2 * fc2.shape[1], x.shape[3])
        tensors = _bytes(x) + b"".join(_bytes(parameters[name]) for name in PARAMETERS)
        return self._call(header, tensors, [(x.shape, x.dtype)])[0]

    def downsample(
        self,
        x: Tensor,
        conv: torch.nn.Conv2d,
        norm: torch.nn.LayerNorm | None,
        act: str,
        low_precision: bool,
        where: Where,
        stride_n: int | None = None,
    ) -> Tensor:
        """act(norm(conv(x))), (N, H, W, channels) to (N, ceil(H / 2), ceil(W / 2), out_channels). stride_n: see op."""
        N, H, W, _ = x.shape
        header = struct.pack(
            "16qd6q", 3, ISAS[where.isa], where.threads, where.at_begin, N, H, W, conv.out_channels, norm is not None,
            3, ACTIVATIONS.index(act), DTYPES[x.dtype], DTYPES[x.dtype], 0, conv.in_channels, int(low_precision),
            0.0 if norm is None else norm.eps, x.stride(0) if stride_n is None else stride_n, *x.stride()[1:], 0, 0,
        )  # fmt: skip
        parameters = (conv.weight, conv.bias, *((None, None) if norm is None else (norm.weight, norm.bias)))
        tensors = _bytes(x) + b"".join(
            _bytes(None if p is None else p.detach().float().contiguous()) for p in parameters
        )
        shape = (N, (H + 1) // 2, (W + 1) // 2, conv.out_channels)
        return self._call(header, tensors, [(shape, x.dtype)])[0]

    def head(self, x: Tensor, norm: torch.nn.LayerNorm, head: torch.nn.Module, where: Where) -> Tensor:
        """head(norm(mean of x over H and W)), (N, H, W, channels) to (N, outputs), the channels contiguous."""
        (N, H, W, C), hidden = x.shape, head.fc1.out_features
        classes = getattr(head.fc2, "out_features", 0)
        dtypes = (DTYPES[x.dtype], DTYPES[head.fc1.weight.dtype], DTYPES[x.dtype])
        header = struct.pack(
            "16qd6q", 6, ISAS[where.isa], where.threads, where.at_begin, N, H, W, hidden, classes,
            head.norm is not None, 0, *dtypes, C, 0, norm.eps, *x.stride()[:3], 0, 0, 0,
        )  # fmt: skip
        modules = (norm, head.fc1, head.norm, head.fc2)
        parameters = [getattr(m, name, None) for m in modules for name in ("weight", "bias")]
        tensors = _bytes(x) + b"".join(_bytes(None if p is None else p.detach()) for p in parameters)
        return self._call(header, tensors, [((N, classes or hidden), x.dtype)])[0]

    def product(
        self, a: Tensor, b: Tensor, bias: Tensor | None, row_sums: bool, of_rows: bool, where: Where
    ) -> list[Tensor]:
        """a (M, K) times b (K, N), plus bias; and the sums of a's rows."""
        M, K, N = *a.shape, b.shape[1]
        header = struct.pack(
            "16qd6q", 5 if of_rows else 4, ISAS[where.isa], where.threads, where.at_begin, M, N, K, 0, 2 * row_sums,
            *[0] * 7, 0.0, *a.stride(), 0, *b.stride(), 0,
        )  # fmt: skip
        tensors = _bytes(a) + _bytes(b) + _bytes(bias)
        return self._call(header, tensors, [((M, N), a.dtype), ((M if row_sums else 0,), a.dtype)])

    def scan(self, arguments: list[Tensor], order: Tensor, dy: Tensor, where: Where) -> list[Tensor]:
        """(y, dx, ddelta, dA, dB, dC, dskip, ddelta_bias) of a selective scan; x and delta of any strides whose last
        is 1."""
        x, delta, A, B, C, skip, bias = arguments
        (N, G, L, D), S, shared = delta.shape, A.shape[2], x.shape[1] == 1
        common = (N, G, L, D, S, int(shared), 0, DTYPES[x.dtype], 0, 0, 0, 0)
        strides = (*(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)),
                   *delta.stride()[:3])  # fmt: skip

        def header(kind: int) -> bytes:
            place = (kind, ISAS[where.isa], where.threads, where.at_begin)
            return struct.pack("16qd6q", *place, *common, 0.0, *strides)

        given = b"".join(map(_bytes, (x, delta, A, B, C, skip, bias, order)))
        y = self._call(header(7), given, [(dy.shape, x.dtype)])
        gradients = [(t.shape, t.dtype) for t in arguments]
        return [*y, *self._call(header(8), given + _bytes(dy), gradients)]
