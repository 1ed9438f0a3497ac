"""The compiled CPU kernels (csrc/cpu): AVX-512, AVX2 or portable, chosen when the module loads."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import ACTIVATIONS

_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_ACT_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}

module: ModuleType | None
try:
    # Relative, its absence would read as "a circular import".
    import mambaout_kernels._C as _C

    module, _reason = _C, None
    _forward = torch.ops.mambaout_kernels_native.gated_dwconv_cpu.default
    _backward = torch.ops.mambaout_kernels_native.gated_dwconv_backward_cpu.default
    _block_pack_bytes = torch.ops.mambaout_kernels_native.gated_cnn_block_pack_bytes_cpu.default
    _pack_block = torch.ops.mambaout_kernels_native.gated_cnn_block_pack_cpu.default
    _downsample_pack_bytes = torch.ops.mambaout_kernels_native.downsample_pack_bytes_cpu.default
    _pack_downsample = torch.ops.mambaout_kernels_native.downsample_pack_cpu.default
    _head = torch.ops.mambaout_kernels_native.head_cpu.default
    _downsample = torch.ops.mambaout_kernels_native.downsample_cpu.default
    linear = torch.ops.mambaout_kernels_native.linear_cpu.default
    linear_dx = torch.ops.mambaout_kernels_native.linear_dx_cpu.default
    linear_dweight = torch.ops.mambaout_kernels_native.linear_dweight_cpu.default
    _block = torch.ops.mambaout_kernels_native.gated_cnn_block_cpu.default
except ImportError as error:
    module = None
    _reason = (
        f"the compiled module cannot be loaded ({error}); with a C++ compiler, from the sources: "
        "pip install cmake ninja pybind11 'setuptools>=77' && pip install --no-build-isolation ."
    )


def unavailable() -> str | None:
    """Why the compiled CPU kernels cannot be used here; None where they can."""
    return _reason


def supports(u: Tensor, weight: Tensor) -> bool:
    """fp32, bf16, fp16 and fp64 on the CPU."""
    return u.device.type == "cpu" and u.dtype in _DTYPES


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y (N, H, W, D), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _forward(u, weight, bias, _ACT_CODES[act])


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias), contiguous, for any strides; the compiled op refuses what it cannot run."""
    return _backward(dy, u, weight, bias, _ACT_CODES[act])


def instruction_set() -> str:
    """The instruction set in use. Packed parameters of a block are for one."""
    assert module is not None
    return str(module.cpu_capability())


def multiplies_bf16() -> bool:
    """Whether the instruction set in use multiplies bfloat16 in what is packed; if not, it multiplies float32."""
    return module is not None and module.cpu_capability() == "avx512_bf16"


def fingerprint(memory: list[tuple[int, int, int]]) -> int:
    """A hash of samples of the given (address, bytes, _) of memory, which must be readable."""
    assert module is not None
    return int(module.fingerprint(memory))


def snapshot(
    entries: list[tuple[dict[str, Any], str, Any]],
    types: list[tuple[Any, type]],
    sizes: list[tuple[Any, int]],
    tensors: list[tuple[Any, ...]],
    memory: list[tuple[int, int, int]],
) -> Any:
    """What objects are now, which its `holds()` compares later ones with (seen.py). They must outlive it."""
    assert module is not None
    return module.Snapshot(entries, types, sizes, tensors, memory)


def pack_block(parameters: list[Tensor | None], bf16: bool, empty: Callable[[int], Tensor]) -> Tensor:
    """A block's parameters as the kernels read them: norm, fc1, conv, fc2 (weight, bias each), scale; float32.

    None for what is not there. bf16: to be multiplied in bfloat16. `empty` gives so many bytes, 64-byte aligned.
    """
    fc1_weight = parameters[2]
    assert fc1_weight is not None
    nothing = fc1_weight.new_empty(0)
    given = [nothing if p is None else p for p in parameters]
    if parameters[4] is None:
        given[4] = fc1_weight.new_empty(0, 1, 1, 1)
    packed = empty(_block_pack_bytes(fc1_weight, given[4], bf16))
    _pack_block(*given, bf16, packed)
    return packed


def gated_cnn_block(x: Tensor, packed: Tensor, eps: float, act: str) -> Tensor:
    """x + scale * fc2(...), (N, H, W, dim), contiguous, for any strides of x in float32 or bfloat16."""
    return _block(x, packed, eps, _ACT_CODES[act])


def pack_downsample(parameters: list[Tensor | None], bf16: bool, empty: Callable[[int], Tensor]) -> Tensor:
    """A 3 x 3 convolution's weight and bias, and its norm's, as the kernels read them; the rest as above."""
    weight = parameters[0]
    assert weight is not None
    packed = empty(_downsample_pack_bytes(weight, bf16))
    _pack_downsample(*(weight.new_empty(0) if p is None else p for p in parameters), bf16, packed)
    return packed


def downsample(x: Tensor, packed: Tensor, normed: bool, eps: float, act: str, bf16: bool) -> Tensor:
    """act(layer_norm(conv(x))), (N, H/2, W/2, out), contiguous; x (N, H, W, in) of any strides; bf16: the result."""
    return _downsample(x, packed, normed, eps, _ACT_CODES[act], bf16)


_NOTHING = torch.empty(0)


def head(
    x: Tensor, parameters: Sequence[Tensor | None], eps: float, mid_eps: float, mid_normed: bool, bf16: bool
) -> Tensor:
    """fc2(norm(gelu(fc1(norm(mean of x))))), (N, classes), contiguous; x (N, H, W, C) of any strides; bf16: the result.

    parameters: of the norm, fc1, the norm between, fc2 (weight, bias each); None for what is not there. The result is
    (N, hidden) without fc2.
    """
    norm_weight, norm_bias, fc1_weight, fc1_bias, mid_weight, mid_bias, fc2_weight, fc2_bias = (
        _NOTHING if p is None else p for p in parameters
    )
    return _head(
        x, norm_weight, norm_bias, eps, fc1_weight, fc1_bias, mid_normed, mid_weight, mid_bias, mid_eps, fc2_weight,
        fc2_bias, bf16,
    )  # fmt: skip
