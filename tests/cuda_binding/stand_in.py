"""csrc/torch/gated_dwconv_cuda.cpp on the CPU: linked with stand_in.cpp instead of CUDA, and cuda_host's kernels."""

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cuda_host import host
from torch import Tensor

HERE = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
NAMESPACE = "mambaout_kernels_stand_in"  # beside those of a compiled module


def missing() -> str | None:
    """Why it cannot be built here; None where it can."""
    if not sys.platform.startswith("linux"):
        return "the linker's --wrap is that of Linux"
    if host.missing():
        return host.missing()
    if not (host.cuda_headers() / "cuda_runtime_api.h").exists():
        return "no cuda_runtime_api.h"
    return None


def _build() -> Path:
    flags = (
        "-O0", "-fPIC", "-fvisibility=hidden", f"-I{host.KERNELS}", f"-isystem{TORCH / 'include'}",
        f"-isystem{host.cuda_headers()}", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    )  # fmt: skip
    sources = (host.KERNELS / "torch" / "gated_dwconv_cuda.cpp", HERE / "stand_in.cpp")
    headers = tuple(host.KERNELS / folder for folder in ("cpu", "cuda", "torch"))
    with ThreadPoolExecutor(max_workers=len(sources)) as pool:
        own = list(pool.map(lambda source: str(host.compiled((source,), flags, *headers)), sources))
    replaced = sorted(set(re.findall(r"__wrap_(\w+)", sources[1].read_text())))
    wraps = [f"-Wl,--wrap={name}" for name in replaced]
    command = ["g++", "-shared", *own, *host.objects(), *wraps, TORCH / "lib" / "libtorch_cpu.so"]
    name = hashlib.sha256(" ".join(map(str, command)).encode()).hexdigest()[:24]
    library = host.built() / f"binding-{name}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", unfinished], check=True)
        unfinished.replace(library)
    return library


class StandIn:
    """The library, once loaded: its ops, and what they called."""

    def __init__(self) -> None:
        self._library = ctypes.PyDLL(str(_build()))  # with the GIL, as an import has it
        self._library.stand_in_register(NAMESPACE.encode())
        self._library.stand_in_begin.argtypes = [ctypes.c_int] * 3 + [ctypes.c_int64, ctypes.c_char_p]
        self._library.stand_in_put.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_int]
        self._library.stand_in_calls.restype = ctypes.c_char_p
        ops = getattr(torch.ops, NAMESPACE)
        self.ops = (
            ops.gated_dwconv_cuda.default,
            ops.gated_dwconv_backward_cuda.default,
            ops.depthwise_cuda.default,
            ops.gated_dwconv_backward_cuda_by.default,
        )

    def begin(
        self, device: int = 0, current: int = 0, runtime: int = 0, streams: int = 0x5000, failing: str = ""
    ) -> None:
        """Tensors are on `device` from now on, torch's current one is `current`, that of the module's own CUDA runtime
        `runtime`; the stream of device d is streams + d; `failing`: the call that fails. No calls yet."""
        self._library.stand_in_begin(device, current, runtime, streams, failing.encode())

    def put(self, tensor: Tensor, device: int | None) -> None:
        """This tensor is on another device; None: on the CPU."""
        self._library.stand_in_put(tensor.data_ptr(), device is not None, -1 if device is None else device)

    @property
    def current(self) -> int:
        return self._library.stand_in_current()

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._library.stand_in_calls().decode().splitlines()]


@cache
def load() -> StandIn:
    return StandIn()
