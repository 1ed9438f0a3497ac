"""Out of PyTorch: the switch to plain ATen operators, and ONNX by it.

torch.export and AOTInductor take a fused model as it is; the op stays one node, and the process that loads the result
must import mambaout_kernels. Where that is not wanted (ONNX, another runtime, C++), trace under `plain_aten()`: the
same model, parameters and state_dict, its blocks as separate ATen operators.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import backends


@contextmanager
def plain_aten() -> Iterator[None]:
    """Inside the `with` block, blocks are traced and run as separate ATen operators: those that this thread calls."""
    with backends.force("reference"):
        yield


def to_onnx(
    model: nn.Module, path: str | os.PathLike[str], example: torch.Tensor | None = None, **options: Any
) -> None:
    """Write an ONNX file of `model`, for any batch, height and width; it holds standard operators only.

    Args:
        model: a MambaOut, or a patched model, in evaluation mode; it stays as it is.
        path: the file. Weights beyond 2 GB go into a second file beside it.
        example: images to trace with, at least 2 of at least 33 x 33; (2, in_chans, 224, 224) of the model's dtype if
            None.
        options: further arguments of torch.onnx.export, such as opset_version.

    Raises:
        ValueError: a model in training mode, or an example of another shape.
        ImportError: onnx and onnxscript are needed: pip install mambaout-kernels[export].
    """
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval() first")
    if example is None:
        like = next(model.parameters())
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
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
    with plain_aten(), torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes=dynamic, **{"input_names": ["images"], **options}
        )
    assert program is not None
    program.save(os.fspath(path))
