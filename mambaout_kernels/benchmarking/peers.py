"""Other runtimes on the CPU, where they are installed: ONNX Runtime and OpenVINO, on the model as ONNX.

They get the number of threads that PyTorch has, and their input in their own layout and fp32, outside the time. What
they compute is compared with fp64 before any of it is timed.
"""

from collections.abc import Callable
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
EXTRA = "peers"
_EXPORTERS = ("onnx", "onnxscript")
# Of eager's error. They round elsewhere (GELU, LayerNorm, the residual stream in bf16), which is not for us to judge; a
# wrong export is off by the size of the values.
SLACK = 8.0
SETTLE_S = 0.01  # a team of threads waits busily for its next work, some milliseconds, beside the next contender's

Run = Callable[[], Tensor]


class NotAvailable(RuntimeError):
    """A peer does not do this at all; the text is the reason."""


def missing() -> dict[str, list[str]]:
    """What each peer that cannot run here lacks: packages, by its name."""
    lacking = {name: [each for each in (name, *_EXPORTERS) if find_spec(each) is None] for name in NAMES}
    return {name: packages for name, packages in lacking.items() if packages}


def installed() -> list[str]:
    """The peers that can run here."""
    return [name for name in NAMES if name not in missing()]


def left_out() -> str | None:
    """A line on the peers that cannot run here and how to get them; None where all can."""
    lacking = missing()
    if not lacking:
        return None
    names = " and ".join(NAMES[name] for name in lacking)
    packages = " ".join(dict.fromkeys(each for found in lacking.values() for each in found))
    return f"left out, not installed: {names}: pip install {packages}, or mambaout-kernels[{EXTRA}]"


def version(name: str) -> str:
    return f"{NAMES[name]} {metadata.version(name)}"


def export(folder: Path, name: str, module: nn.Module, x: Tensor) -> Path:
    """`module` as an ONNX file in `folder`, for inputs such as `x` of any batch; written where it is not there yet."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        from ..integrations.export import to_onnx

        open_sizes = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)  # of a block the last is not
        to_onnx(module, path, _example(x), verbose=False, dynamic_shapes=open_sizes)
    return path


def _example(x: Tensor) -> Tensor:
    """An input to export with: two samples at least, and more than 32 of what may be another number in a call."""
    sizes = [max(2, x.shape[0]), *x.shape[1:]]
    sizes[2] = max(33, sizes[2])
    return torch.zeros(sizes)


def build(name: str, path: Callable[[], Path], x: Tensor, dtype: str) -> Run:
    """The model in the ONNX file on `x` in fp32, computed in `dtype` by a peer on as many threads as PyTorch uses.

    Args:
        path: gives the file; not called where the peer cannot compute in `dtype`.

    Raises:
        NotAvailable: it cannot, here.
    """
    return _BUILDERS[name](path, x, dtype, torch.get_num_threads())


def _onnxruntime(path: Callable[[], Path], x: Tensor, dtype: str, threads: int) -> Run:
    if dtype != "fp32":
        raise NotAvailable(f"ONNX Runtime has no {dtype} kernels for the CPU")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between runs, others' turn
    file = path()
    for dimension, size in dimensions(file, x).items():
        options.add_free_dimension_override_by_name(dimension, size)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def dimensions(file: Path, x: Tensor) -> dict[str, int]:
    """What the dimensions that the ONNX file leaves open are for `x`, by their names."""
    import onnx

    [taken] = onnx.load(file, load_external_data=False).graph.input
    return {
        dimension.dim_param: size
        for dimension, size in zip(taken.type.tensor_type.shape.dim, x.shape, strict=True)
        if dimension.dim_param
    }


def _openvino(path: Callable[[], Path], x: Tensor, dtype: str, threads: int) -> Run:
    hint = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}.get(dtype)
    import openvino

    core = openvino.Core()
    if hint is None or (hint != "f32" and hint.upper() not in _capabilities(core)):
        raise NotAvailable(f"OpenVINO computes no {dtype} on this CPU")
    model = core.read_model(str(path()))
    model.reshape(list(x.shape))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # threads stay where the process is
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    return partial(_infer, request, x)


def _capabilities(core: Any) -> list[str]:
    return core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _infer(request: Any, x: Tensor) -> Tensor:
    """`x` is what the request reads, without holding it."""
    request.infer()
    return torch.from_numpy(request.get_output_tensor().data)


_BUILDERS = {"onnxruntime": _onnxruntime, "openvino": _openvino}
