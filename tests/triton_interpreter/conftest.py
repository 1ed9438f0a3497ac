"""These tests run Triton's interpreter, which is chosen before triton is imported: TRITON_INTERPRET=1 pytest <this>."""

import dataclasses
import functools
import inspect
import os
from importlib.util import find_spec

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


def _round_to_bfloat16(x):
    """uint16 of float32, to nearest, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _fused(self, x, y, z):
    """Products of fp32 are exact in fp64, so that the sum alone is rounded."""
    from triton.runtime.interpreter import TensorHandle

    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _as_float32(handle):
    """bfloat16, which the interpreter keeps as uint16, in a form that NumPy multiplies: every product is exact."""
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype(np.float32)
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _dot(self, a, b, sums, *_):
    """Products of 16-bit numbers are exact in fp32, and added there, as tensor cores do; fp32 is multiplied as fp32."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.matmul(_as_float32(a), _as_float32(b)) + sums.data, sums.dtype.scalar)


@pytest.fixture(autouse=True, scope="session")
def _arithmetic_of_the_compiled_code():
    """The interpreter cuts fp32 to bf16, rounds the product of tl.fma, and multiplies the bits of bf16 in tl.dot.

    Machine code rounds once (cvt.rn, fma.rn).
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(_round_to_bfloat16(np.ascontiguousarray(source.data)), target.scalar)
        return cut(self, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast)
        patch.setattr(InterpreterBuilder, "create_fma", _fused)
        patch.setattr(InterpreterBuilder, "create_dot", _dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def _less_work_for_the_interpreter():
    """Its sums of int32 are made again in int64 to see overflow, which sizes of hundreds cannot have; a table is made
    anew for every value, and the names of the language are looked for at every call of a function."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, of_scalars = interpreter.interpreter_builder, functools.cache(interpreter._get_np_dtype)

    def dtype_of(kind):
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        return np.dtype(np.uint64) if isinstance(kind, tl.pointer_type) else of_scalars(kind)

    @functools.cache
    def builtins_of(package):
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtins(package, builder, scope):
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not yet
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", dtype_of)
        patch.setattr(interpreter, "_patch_builtin", patch_builtins)
        yield
