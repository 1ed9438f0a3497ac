"""Out of PyTorch: the switch to plain ATen operators, and ONNX by it.

torch.export and AOTInductor take a fused model as it is; the op stays one node, and the process that loads the result
must import mambaout_kernels. Where that is not wanted (another runtime, C++), trace under `plain_aten()`: the same
model, parameters and state_dict, its blocks as separate ATen operators. torch.onnx.export always gets these.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import backends
from ..backends.namespace import NAMESPACE


@contextmanager
def plain_aten() -> Iterator[None]:
    """Inside the `with` block, blocks are traced and run as separate ATen operators: those that this thread calls."""
    with backends.force("reference"):
        yield


def to_onnx(
    model: nn.Module, path: str | os.PathLike[str], example: torch.Tensor | None = None, **options: Any
) -> None:
    """Write an ONNX file of `model`, for any batch, height and width; it holds standard operators only.

    Its input is `images` (batch, channels, height, width), its output `logits`.

    Args:
        model: a MambaOut, or a patched model, in evaluation mode; it stays as it is.
        path: the file. Weights beyond 2 GB go into a second file beside it.
        example: images to trace with, at least 2 of at least 33 x 33; (2, in_chans, 224, 224) of the model's dtype if
            None.
        options: further arguments of torch.onnx.export, such as opset_version; dynamic_shapes for a block, or another
            module whose input is not (N, channels, H, W).

    Raises:
        ValueError: a model in training mode, an InferenceModel, or an example of another shape.
        TypeError: a bfloat16 model, for whose convolutions ONNX Runtime has no kernels on the CPU.
        ImportError: onnx and onnxscript are needed: pip install mambaout-kernels[export].
    """
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    like = next(model.parameters())
    if like.dtype == torch.bfloat16:
        raise TypeError(
            "model must not be bfloat16, of which few runtimes have convolutions: export it in float32, and let the "
            "runtime compute in bfloat16 (OpenVINO: INFERENCE_PRECISION_HINT)"
        )
    if example is None:
        example = torch.zeros(2, getattr(model, "in_chans", 3), 224, 224, dtype=like.dtype, device=like.device)
    if example.ndim != 4 or example.shape[0] < 2 or min(example.shape[2:]) < 33:
        raise ValueError(
            f"example must be (N, channels, H, W), N >= 2, H and W >= 33, so that no size is taken for a constant; got "
            f"{tuple(example.shape)}"
        )
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError("to_onnx needs onnx and onnxscript: pip install mambaout-kernels[export]") from None
    named = {
        "input_names": ["images"],
        "output_names": ["logits"],
        "dynamic_shapes": ({0: "batch", 2: "height", 3: "width"},),
    }
    try:
        with plain_aten(), torch.no_grad():
            program = torch.onnx.export(model, (example,), dynamo=True, **{**named, **options})
    except torch.onnx.errors.OnnxExporterError as error:
        if f"{NAMESPACE}." not in str(error):
            raise
        raise ValueError(
            "model must not be an InferenceModel, whose packed weights no other runtime reads: export the model "
            "that it was made from"
        ) from error
    assert program is not None
    program.save(os.fspath(path))
