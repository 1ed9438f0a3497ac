"""Every Triton kernel as it is launched, compiled ahead of time: no GPU, no driver."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..backends.triton_kernels import tiles
from .record import CompiledKernel

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"float32": ("fp32", 32), "bfloat16": ("bf16", 16), "float16": ("fp16", 16)}
_WIDTHS = (7, 14, 28, 56)  # of the family's maps at 224 x 224
_TYPED = frozenset(("u_ptr", "y_ptr", "dy_ptr", "du_ptr", "e_ptr"))


@dataclass(frozen=True)
class Configuration:
    """One kernel with one tile for one target. aligned: every size and stride is a multiple of 16 bytes."""

    kernel: str
    target: str
    dtype: str
    tile: tiles.Tile
    K: int = 7
    act: str = "gelu"
    aligned: bool = True


def configurations(
    targets: tuple[str, ...] = TARGETS,
    kernel_sizes: tuple[int, ...] = (7,),
    acts: tuple[str, ...] = ("gelu",),
    alignments: tuple[bool, ...] = (True, False),
) -> Iterator[Configuration]:
    """What tiles.json launches for the family's maps, each once."""
    for target in targets:
        seen = set()
        for kernel, (dtype, (_, bits)), K, aligned, width in product(
            tiles.KERNELS, DTYPES.items(), kernel_sizes, alignments, _WIDTHS
        ):
            tile = tiles.choose(target, kernel, bits, width, K, aligned)
            for act in acts if kernel in ("forward", "gate_backward") else acts[:1]:
                seen.add(Configuration(kernel, target, dtype, tile, K, act, aligned))
        yield from sorted(seen, key=lambda c: (not c.aligned, str(c)))


def _kernel(configuration: Configuration) -> tuple[Any, dict[str, Any]]:
    """The jitted function and its compile-time constants."""
    from ..backends.triton_kernels import backward, forward, weight_gradient

    tile, K = configuration.tile, configuration.K
    vector = tiles.VECTOR_BYTES * 8 // DTYPES[configuration.dtype][1] if configuration.aligned else 1
    constants = {"K": K, "VEC": vector, "BLOCK_W": tile.block_w, "BLOCK_D": tile.block_d}
    if configuration.kernel == "weight_gradient":
        constants |= {"GROUP": tiles.group(K), "VEC": min(vector, tile.per_thread())}
        return weight_gradient.weight_gradient_partials, constants
    constants["BLOCK_H"] = tile.block_h
    if configuration.kernel == "input_gradient":
        return backward.input_gradient, constants
    function = forward.gated_dwconv_fwd if configuration.kernel == "forward" else backward.gate_backward
    return function, constants | {"ACT": configuration.act, "STAGES": tile.stages}


def _signature(
    function: Any, constants: dict[str, Any], element_of: Callable[[str], str], amd: bool
) -> tuple[dict, dict]:
    """Types by argument, and what the launcher says of their values: of pointers alone, see kernel.py.

    They are multiples of 16, and on AMD to tensors below 2 GB.
    """
    types, known = {}, {}
    for position, name in enumerate(function.arg_names):
        pointer = name.endswith("_ptr")
        number = "fp32" if name == "eps" else "i32"
        types[name] = "constexpr" if name in constants else f"*{element_of(name)}" if pointer else number
        if pointer:
            known[(position,)] = [["tt.divisibility", 16], *([["tt.pointer_range", 32]] if amd else [])]
    return types, known


def machine_code(
    function: Any, constants: dict[str, Any], element_of: Callable[[str], str], target: str, options: dict[str, Any]
) -> tuple[Any, int]:
    """(what Triton makes of a jitted function, threads of a warp). element_of: of the tensors, by argument.

    RuntimeError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if not hasattr(function, "arg_names") or type(function).__name__ == "InterpretedFunction":
        raise RuntimeError("TRITON_INTERPRET is set: kernels run in the interpreter and cannot be compiled")
    amd = target.startswith("gfx")
    types, known = _signature(function, constants, element_of, amd)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(function, types, constexprs=constants, attrs=known)
    return compile(source, target=gpu, options=options), gpu.warp_size


def compile_ahead(configuration: Configuration) -> CompiledKernel:
    """Machine code of a configuration; raises as `machine_code` does."""
    element = DTYPES[configuration.dtype][0]
    compiled, warp = machine_code(
        *_kernel(configuration),
        lambda name: element if name in _TYPED else "fp32",
        configuration.target,
        configuration.tile.options(),
    )
    amd = configuration.target.startswith("gfx")
    return CompiledKernel(
        backend="triton",
        name=configuration.kernel,
        dtype=configuration.dtype,
        target=configuration.target,
        threads=configuration.tile.num_warps * warp,
        shared_bytes=compiled.metadata.shared,
        K=configuration.K,
        act=configuration.act,
        block_h=configuration.tile.block_h,
        block_w=configuration.tile.block_w,
        block_d=configuration.tile.block_d,
        parts=configuration.K // tiles.group(configuration.K) if configuration.kernel == "weight_gradient" else 1,
        aligned=configuration.aligned,
        cubin=None if amd else compiled.asm["cubin"],
        assembly=compiled.asm["amdgcn"] if amd else None,
    )


def amd_usage(assembly: str) -> dict[str, int]:
    """Vector registers; spilled ones and bytes of memory for them; 16-byte accesses. Read from AMD's assembly."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": number("vgpr_count"),
        # Not sgpr_spill_count: scalars are kept in lanes of a vector register, and where they are not, in this memory.
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "loads_128": len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly)),
        "stores_128": len(re.findall(r"(?:global|buffer)_store_dwordx4", assembly)),
    }
