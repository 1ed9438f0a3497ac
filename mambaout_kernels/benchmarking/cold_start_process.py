"""One cold start: reads from stdin, as JSON, what to load and to call; writes to stdout what that took.

Run as a program by the text of this file, without the package around it: what it imports, and when, is timed.
"""

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = {
    "fused": ("numpy", "torch", "mambaout_kernels"),
    "saved": ("numpy", "torch", "mambaout_kernels"),
    "eager": ("numpy", "torch", "mambaout_kernels"),
    "onnxruntime": ("numpy", "onnxruntime"),
    "openvino": ("numpy", "openvino"),
}
WARM_CALLS = 10
Call = Callable[[], Any]  # gives a float32 array


def _torch_call(model: Any, x: Any, dtype: Any) -> Call:
    import torch

    images = torch.from_numpy(x).to(dtype)

    def call() -> Any:
        with torch.inference_mode():
            return model(images).float().numpy()

    return call


def _fused(start: dict[str, Any], x: Any) -> Call:
    import torch

    import mambaout_kernels as mk

    dtype = getattr(torch, start["dtype"])
    model = mk.from_pretrained(start["file"], variant=start["variant"])
    return _torch_call(mk.optimize_for_inference(model, dtype=dtype), x, dtype)


def _saved(start: dict[str, Any], x: Any) -> Call:
    import torch

    import mambaout_kernels as mk

    return _torch_call(mk.load_inference_model(start["file"]), x, getattr(torch, start["dtype"]))


def _eager(start: dict[str, Any], x: Any) -> Call:
    import torch

    import mambaout_kernels as mk

    dtype = getattr(torch, start["dtype"])
    mk.backends.set_default("reference")
    model = mk.from_pretrained(start["file"], variant=start["variant"]).eval().to(dtype)
    return _torch_call(model, x, dtype)


def _onnxruntime(start: dict[str, Any], x: Any) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = start["threads"], 1
    options.log_severity_level = 3  # errors
    for dimension, size in start["dimensions"].items():
        options.add_free_dimension_override_by_name(dimension, size)
    session = onnxruntime.InferenceSession(start["file"], options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)[0]


def _openvino(start: dict[str, Any], x: Any) -> Call:
    import openvino

    core = openvino.Core()
    model = core.read_model(start["file"])
    model.reshape(list(x.shape))
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[start["dtype"]]
    settings = {"INFERENCE_NUM_THREADS": start["threads"], "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    return lambda: request.infer([x])[0]


LOADERS = {"fused": _fused, "saved": _saved, "eager": _eager, "onnxruntime": _onnxruntime, "openvino": _openvino}


def _status_bytes(field: str) -> int | None:
    """Of /proc/self/status; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def timed(start: dict[str, Any]) -> dict[str, Any]:
    """Seconds of import and load (ready: both), of the first call and of later ones; bytes resident; y."""
    begin = time.perf_counter()
    for module in MODULES[start["name"]]:
        importlib.import_module(module)
    imported = time.perf_counter()
    x = sys.modules["numpy"].load(start["x"])
    begin_load = time.perf_counter()
    call = LOADERS[start["name"]](start, x)
    loaded = time.perf_counter()
    y = call()
    called = time.perf_counter()
    warm = []
    for _ in range(WARM_CALLS):
        again = time.perf_counter()
        call()
        warm.append(time.perf_counter() - again)
    return {
        "ready_s": imported - begin + loaded - begin_load,
        "import_s": imported - begin,
        "load_s": loaded - begin_load,
        "first_s": called - loaded,
        "warm_s": statistics.median(warm),
        "steady_bytes": _status_bytes("VmRSS"),
        "peak_bytes": _status_bytes("VmHWM"),
        "y": y.tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(timed(json.load(sys.stdin))))
