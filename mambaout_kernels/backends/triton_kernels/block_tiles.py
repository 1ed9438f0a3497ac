"""Which tiles the kernels of block.py are launched with: of sm_90 the fastest on an H100 (benchmarks/NOTES.md), of
others predicted from machine code (`mambaout-kernels audit`)."""

import functools
from dataclasses import dataclass

_SMALLEST = 16  # of every side of tl.dot


def parts(width: int) -> tuple[int, int]:
    """(K0, K1): powers of two whose sum is `width` or the least above; K1 = 0 where one will do."""
    first = max(_SMALLEST, 1 << (width.bit_length() - 1))
    rest = width - first
    return first, 0 if rest <= 0 else max(_SMALLEST, 1 << (rest - 1).bit_length())


@dataclass(frozen=True)
class BlockTile:
    """Rows (pixels) and columns of one program; block_k: inputs of a product at a time, where not all.

    registers: at most, of a thread, so that several programs share a multiprocessor; None: as the compiler likes.
    may_spill: measured to be faster than tiles whose programs keep all in registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    stages: int
    block_k: int = 0
    registers: int | None = None
    may_spill: bool = False

    def options(self) -> dict[str, int]:
        """The compiler's, as launches and the audit give them."""
        found = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return found if self.registers is None else {**found, "maxnreg": self.registers}


@dataclass(frozen=True)
class BlockRow:
    """The tile for blocks up to `widest`, of elements of `bits`, on `arch` or on any."""

    arch: str
    kernel: str
    bits: int
    widest: int
    tile: BlockTile


_ANY = 1 << 30
# Others than sm_90's: by registers without spills, then by warps that share a multiprocessor.
ROWS = (
    BlockRow("sm_90", "gated_mlp", 16, 96, BlockTile(64, 32, 4, 2, registers=168)),
    BlockRow("sm_90", "gated_mlp", 16, 128, BlockTile(64, 32, 4, 3)),
    BlockRow("sm_90", "gated_mlp", 16, 192, BlockTile(128, 32, 8, 3)),
    BlockRow("sm_90", "gated_mlp", 16, _ANY, BlockTile(128, 32, 8, 3, may_spill=True)),
    BlockRow("sm_100", "gated_mlp", 16, 192, BlockTile(128, 32, 8, 2)),
    BlockRow("sm_80", "gated_mlp", 16, 192, BlockTile(32, 32, 4, 2)),
    BlockRow("any", "gated_mlp", 16, 128, BlockTile(64, 32, 4, 2)),
    BlockRow("gfx942", "gated_mlp", 16, _ANY, BlockTile(64, 16, 8, 2)),
    BlockRow("any", "gated_mlp", 16, 192, BlockTile(32, 32, 8, 2)),
    BlockRow("any", "gated_mlp", 16, _ANY, BlockTile(64, 32, 8, 2)),
    BlockRow("sm_90", "gated_mlp", 32, 128, BlockTile(64, 16, 4, 2)),
    BlockRow("sm_90", "gated_mlp", 32, _ANY, BlockTile(64, 16, 8, 2)),
    BlockRow("sm_100", "gated_mlp", 32, _ANY, BlockTile(64, 16, 8, 2)),
    BlockRow("any", "gated_mlp", 32, _ANY, BlockTile(32, 16, 8, 2)),
    BlockRow("any", "gated_linear", 16, _ANY, BlockTile(128, 64, 8, 3, block_k=64)),
    BlockRow("any", "gated_linear", 32, _ANY, BlockTile(64, 64, 8, 3, block_k=32)),
    BlockRow("sm_90", "norm_linear", 16, 128, BlockTile(128, 64, 4, 1)),
    BlockRow("sm_90", "norm_linear", 16, 192, BlockTile(128, 64, 8, 1)),
    BlockRow("sm_90", "norm_linear", 16, _ANY, BlockTile(64, 32, 4, 1)),
    BlockRow("any", "norm_linear", 16, _ANY, BlockTile(64, 64, 4, 1)),
    BlockRow("any", "norm_linear", 32, _ANY, BlockTile(64, 32, 8, 1)),
    BlockRow("any", "layer_norm", 16, 96, BlockTile(16, 0, 4, 1)),
    BlockRow("any", "layer_norm", 16, _ANY, BlockTile(4, 0, 1, 1)),
    BlockRow("any", "layer_norm", 32, 96, BlockTile(16, 0, 4, 1)),
    BlockRow("any", "layer_norm", 32, _ANY, BlockTile(4, 0, 1, 1)),
    BlockRow("any", "layer_norm_backward", 16, 64, BlockTile(16, 0, 2, 1)),
    BlockRow("any", "layer_norm_backward", 16, 128, BlockTile(8, 0, 2, 1)),
    BlockRow("any", "layer_norm_backward", 16, 256, BlockTile(4, 0, 2, 1)),
    BlockRow("any", "layer_norm_backward", 16, 640, BlockTile(2, 0, 2, 1)),
    BlockRow("any", "layer_norm_backward", 16, _ANY, BlockTile(1, 0, 1, 1)),
    BlockRow("any", "layer_norm_backward", 32, 128, BlockTile(8, 0, 4, 1)),
    BlockRow("any", "layer_norm_backward", 32, _ANY, BlockTile(4, 0, 4, 1)),
    BlockRow("sm_120", "image_conv", 16, _ANY, BlockTile(64, 0, 4, 1, block_k=32)),
    BlockRow("any", "image_conv", 16, _ANY, BlockTile(128, 0, 4, 1, block_k=32)),
    BlockRow("sm_90", "conv3x3s2_norm", 16, 96, BlockTile(128, 0, 4, 4, block_k=32)),
    BlockRow("any", "conv3x3s2_norm", 16, _ANY, BlockTile(64, 0, 4, 3, block_k=64)),
)
KERNELS = tuple(dict.fromkeys(row.kernel for row in ROWS))


_MOST_PROGRAMS = 1056  # of the norm's backward: eight for each multiprocessor of an H100


def programs_of_backward(blocks: int) -> int:
    """Of layer_norm_bwd, each with an equal share of the blocks of rows: from their number alone, so that sums keep
    their order on every GPU."""
    shares = max(1, min(_MOST_PROGRAMS, blocks // 4))
    return -(-blocks // -(-blocks // shares)) if blocks else 0


@functools.cache
def choose(arch: str, kernel: str, bits: int, dim: int) -> BlockTile:
    """The first row that fits `kernel` of block.py at block width `dim`; arch as in tiles.json ("sm_90", "gfx942")."""
    for row in ROWS:
        if row.arch in (arch, "any") and (row.kernel, row.bits) == (kernel, bits) and dim <= row.widest:
            return row.tile
    raise LookupError(f"no tile for {kernel} of {bits}-bit elements")
