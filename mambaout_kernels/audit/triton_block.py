"""The Triton kernels of blocks (triton_kernels/block.py, layer_norm_backward.py), compiled ahead of time: what a launch
executes, moves and multiplies, and a bound of its time from datasheets. Nothing here is a measurement."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..backends.triton_kernels import block_tiles, tiles
from ..benchmarking import shapes
from . import sass
from .devices import L2_BYTES, WARP, device
from .roofline import Prediction, Shape, microseconds_per_cycle, pipes
from .triton import DTYPES, amd_usage, machine_code

KERNELS = (*block_tiles.KERNELS, "depthwise")
_CONVOLUTIONS = ("image_conv", "conv3x3s2_norm")  # of the stem: first and second
_FLOAT32 = ("taps_ptr", "partials_ptr")
_TURNS = 4.0  # blocks of rows of a program of the norm's backward: as few as there are, but on the largest maps
_WITHOUT_PRODUCTS = ("depthwise", "layer_norm", "layer_norm_backward")
_TENSOR = ("HGMMA", "HMMA", "UTCHMMA")


@dataclass(frozen=True)
class BlockKernel:
    """One kernel for one target, dtype and stage of a model."""

    name: str
    target: str
    dtype: str
    dim: int
    hidden: int
    conv_channels: int
    K: int = 7
    act: str = "gelu"

    @property
    def bits(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def tile(self) -> Any:
        if self.name == "depthwise":
            return tiles.choose(self.target, "forward", self.bits, 56, self.K, True)
        return block_tiles.choose(self.target, self.name, self.bits, self.widths[1])

    @property
    def widths(self) -> tuple[int, int]:
        """Input and output channels; dim is the stage's, behind the stem."""
        return {"image_conv": (3, self.dim // 2), "conv3x3s2_norm": (self.dim // 2, self.dim)}.get(
            self.name, (self.dim, self.dim)
        )


def _function(kernel: BlockKernel) -> tuple[Any, dict[str, Any]]:
    """The jitted function and its compile-time constants, as block_launch.py gives them."""
    from ..backends.triton_kernels import block, layer_norm_backward

    tile, (C, dim) = kernel.tile, kernel.widths
    k0, k1 = block_tiles.parts(dim)
    if kernel.name == "depthwise":
        vector = tiles.VECTOR_BYTES * 8 // kernel.bits
        blocks = {"BLOCK_H": tile.block_h, "BLOCK_W": tile.block_w, "BLOCK_D": tile.block_d}
        return block.depthwise_fwd, {"K": kernel.K, "VEC": vector, **blocks}
    precision = "tf32" if kernel.bits == 32 else "ieee"  # "ieee" of float32 is never launched
    if kernel.name in _CONVOLUTIONS:
        first = kernel.name == "image_conv"
        act = kernel.act if first else "identity"
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "STAGES": tile.stages}
        return block.conv3x3s2_norm_fwd, {
            "C": C, "DIM": dim, "K0": k0, "K1": k1, "ACT": act, "NHWC": not first, **blocks
        }  # fmt: skip
    constants: dict[str, Any] = {"DIM": dim, "BLOCK_M": tile.block_m}
    if kernel.name == "layer_norm_backward":
        own = {"K0": k0, "K1": k1, "ACT": "identity", "NORMED": True}
        return layer_norm_backward.layer_norm_bwd, {**constants, **own}
    constants |= {"PRECISION": precision}
    if kernel.name == "layer_norm":
        return block.layer_norm_fwd, {**constants, "K0": k0, "K1": k1, "BIASED": False, "ACT": "identity"}
    constants |= {"BLOCK_N": tile.block_n}
    if kernel.name == "norm_linear":
        return block.norm_linear_fwd, {**constants, "K0": k0, "K1": k1, "N": kernel.conv_channels}
    constants |= {"D": kernel.hidden, "C": kernel.conv_channels, "ACT": kernel.act, "STAGES": tile.stages}
    if kernel.name == "gated_linear":
        return block.gated_linear_fwd, {**constants, "BLOCK_K": tile.block_k}
    return block.gated_mlp_fwd, {**constants, "K0": k0, "K1": k1, "SCALED": False}


@dataclass(frozen=True)
class Compiled:
    """What a kernel's machine code says. Of AMD's only registers, spills and widths."""

    kernel: BlockKernel
    threads: int
    registers: int
    spills: int
    shared_bytes: int
    loads: Counter[int]
    stores: Counter[int]
    tensor: str  # the instruction that multiplies on tensor cores
    executed: Counter[str]  # opcodes that one thread runs, in the mean of the programs

    @property
    def resident_blocks(self) -> int:
        return device(self.kernel.target).resident_blocks(self.registers, self.threads, self.shared_bytes)

    @property
    def failures(self) -> list[str]:
        """Gates that it does not pass."""
        found = [f"spills: {self.spills}"] if self.spills and not getattr(self.kernel.tile, "may_spill", False) else []
        if self.kernel.name not in _WITHOUT_PRODUCTS and not self.tensor:
            found.append("no tensor cores")
        return found


def compile_ahead(kernel: BlockKernel) -> Compiled:
    """RuntimeError under TRITON_INTERPRET=1, where nothing is compiled."""
    function, constants = _function(kernel)
    element = DTYPES[kernel.dtype][0]
    amd = kernel.target.startswith("gfx")
    options = {name: value for name, value in kernel.tile.options().items() if not (amd and name == "maxnreg")}
    compiled, warp = machine_code(
        function, constants, lambda name: "fp32" if name in _FLOAT32 else element, kernel.target, options
    )
    threads, shared = kernel.tile.num_warps * warp, compiled.metadata.shared
    if amd:
        text = compiled.asm["amdgcn"]
        usage, matrix = amd_usage(text), "MFMA" if "v_mfma" in text else ""
        wide = Counter({16: usage["loads_128"]}), Counter({16: usage["stores_128"]})
        return Compiled(kernel, threads, usage["registers"], usage["spills"], shared, *wide, matrix, Counter())
    text, registers, stack = sass.disassemble(compiled.asm["cubin"])
    code = sass.parse(text)
    return Compiled(
        kernel, threads, registers, stack + sum(line.name in ("STL", "LDL") for line in code), shared,
        Counter(line.bytes for line in code if line.name in ("LDG", "LDGSTS")),
        Counter(line.bytes for line in code if line.name == "STG"),
        next((name for name in _TENSOR if any(line.name == name for line in code)), ""),
        _executed(kernel, code),
    )  # fmt: skip


def _trips(kernel: BlockKernel) -> list[float]:
    """Of the loops in their order: over identity channels, then over conv channels; a program of gated_linear has one
    of two, so that the mean program runs each so often."""
    identity, tile = kernel.hidden - kernel.conv_channels, kernel.tile
    if kernel.name == "gated_mlp":
        return [-(-n // tile.block_n) for n in (identity, kernel.conv_channels)]
    if kernel.name == "gated_linear":
        parts = [-(-n // tile.block_n) for n in (identity, kernel.conv_channels)]
        return [-(-kernel.dim // tile.block_k) * part / sum(parts) for part in parts]
    if kernel.name in _CONVOLUTIONS:
        return [-(-9 * kernel.widths[0] // tile.block_k)]
    if kernel.name == "layer_norm_backward":
        return [_TURNS]
    return [float(kernel.K)] if kernel.name == "depthwise" else []


def _executed(kernel: BlockKernel, code: list[sass.Instruction]) -> Counter[str]:
    nest = sass.loops(code)
    outer = [loop for loop in nest if not any(loop.first in o and o is not loop for o in nest)]
    outer.sort(key=lambda loop: loop.first)
    trips = _trips(kernel)
    if len(outer) < len(trips):  # short ones are unrolled
        trips = []
    # Of equally many loops; more are waits, which run once.
    longest = sorted(outer, key=lambda loop: loop.first - loop.last)[: len(trips)]
    pairs = list(zip(sorted(longest, key=lambda loop: loop.first), trips, strict=True))
    return sass.executed(code, pairs)


def programs(kernel: BlockKernel, shape: Shape) -> int:
    tile = kernel.tile
    if kernel.name == "depthwise":
        tall, wide = -(-shape.H // tile.block_h), -(-shape.N * shape.W // tile.block_w)
        return tall * wide * -(-shape.C // tile.block_d)
    rows = -(-shape.pixels * (4 if kernel.name == "image_conv" else 1) // tile.block_m)
    if kernel.name == "layer_norm_backward":
        return -(-rows // int(_TURNS))
    if kernel.name == "gated_linear":
        return rows * sum(-(-n // tile.block_n) for n in (shape.D - shape.C, shape.C))
    return rows


def elements_moved(name: str, dim: int, shape: Shape) -> int:
    """Elements per pixel of inputs and outputs: what it cannot avoid to move. Of the stage, which the stem's first
    convolution has four of."""
    return {
        "image_conv": 16 * 3 + 4 * (dim // 2),
        "conv3x3s2_norm": 4 * (dim // 2) + dim,
        "layer_norm": 2 * dim,
        "layer_norm_backward": 4 * dim,
        "norm_linear": dim + shape.C,
        "depthwise": 2 * shape.C,
        "gated_mlp": 2 * dim + shape.C,
        "gated_linear": dim + shape.C + shape.D,
    }[name]


def products(name: str, dim: int, shape: Shape) -> int:
    """Multiply-adds per pixel on tensor cores."""
    gated = dim * (2 * shape.D - shape.C)
    return {
        "image_conv": 4 * 27 * (dim // 2),
        "conv3x3s2_norm": 9 * (dim // 2) * dim,
        "norm_linear": dim * shape.C,
        "gated_mlp": gated + dim * shape.D,
        "gated_linear": gated,
    }.get(name, 0)


def _elements_read_again(kernel: BlockKernel, shape: Shape) -> float:
    """From L2, by one program: weights, each of which multiplies one element; and gated_linear's rows."""
    if kernel.name != "gated_linear":
        return products(kernel.name, kernel.dim, shape) / (4 if kernel.name == "image_conv" else 1)
    tile, identity = kernel.tile, (shape.D - shape.C) / shape.D  # whose programs have two tiles of weights
    return kernel.dim * (tile.block_m + (1 + identity) * tile.block_n)


def bound(compiled: Compiled, shape: Shape) -> Prediction:
    """Every limit at its datasheet rate, as if the others were hidden behind it; a wave of programs is whole."""
    kernel, on = compiled.kernel, device(compiled.kernel.target)
    launched, warps, bytes_each = programs(kernel, shape), compiled.threads / WARP, kernel.bits // 8
    total = Counter({opcode: n * launched * warps for opcode, n in compiled.executed.items()})
    moved = elements_moved(kernel.name, kernel.dim, shape) * bytes_each * shape.pixels
    multiplied = 2 * products(kernel.name, kernel.dim, shape) * shape.pixels
    tensor = on.tensor_tflops * 1e12 * (1 if kernel.bits == 16 else 0.5) / (on.multiprocessors * on.ghz * 1e9)
    cycles = {
        **pipes(total, on),
        "tensor cores": multiplied / tensor,
        "L2": (moved + _elements_read_again(kernel, shape) * launched * bytes_each) / L2_BYTES,
    }
    floor = moved / on.dram_tb_s / 1e6
    scale = microseconds_per_cycle(launched, on)
    return Prediction({"DRAM": floor, **{name: n * scale for name, n in cycles.items()}}, floor)


def configurations(
    targets: Sequence[str], dtypes: Sequence[str], variant: str, names: Sequence[str] = KERNELS
) -> list[BlockKernel]:
    """What the stages of a variant launch, each once; widths are filled up as the inference model does."""
    from ..ops.conv_norm import NARROW_CONV
    from ..ops.split_block import NARROW

    found: dict[BlockKernel, None] = {}
    for stage in shapes.stages(variant):
        narrow = stage.dim <= NARROW
        stem = _CONVOLUTIONS if stage.stage == 1 and stage.dim <= NARROW_CONV else ()
        for name in (
            *stem,
            *(("norm_linear", "depthwise", "gated_mlp") if narrow else ("layer_norm", "depthwise", "gated_linear")),
        ):
            for target in targets:
                for dtype in dtypes:
                    if name in names and (name not in _CONVOLUTIONS or DTYPES[dtype][1] == 16):
                        found[kernel_of(name, target, dtype, stage)] = None
    return list(found)


def kernel_of(name: str, target: str, dtype: str, stage: shapes.Shape) -> BlockKernel:
    shape = filled_up(stage, 1, dtype)
    return BlockKernel(name, target, dtype, stage.dim, shape.D, shape.C, stage.kernel_size, stage.act)


def filled_up(stage: shapes.Shape, batch: int, dtype: str) -> Shape:
    """The stage's shape with hidden and conv channels of whole 16-byte accesses."""
    multiple = tiles.VECTOR_BYTES * 8 // DTYPES[dtype][1]
    identity = -(-(stage.hidden - stage.conv_channels) // multiple) * multiple
    C = -(-stage.conv_channels // multiple) * multiple
    return Shape(batch, stage.height, stage.width, identity + C, C)
