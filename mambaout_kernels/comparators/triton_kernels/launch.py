"""Tensors to kernel arguments, and how the work is divided: by shapes alone, so that sums keep their order."""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...backends.triton_kernels.launch import _guard
from ...backends.triton_kernels.tiles import VECTOR_BYTES
from .backward import scan_bwd
from .forward import chunk_ends, scan_fwd
from .sums import clear_unvisited, mark_tokens, sum_partials

PROGRAMS = 2048  # warps that an H100 holds of them
MOST_CHUNKS = 32
SEGMENT = 32  # steps between the states that backward starts from; the least of a chunk
_TOKENS = 64  # of a program that looks for unvisited ones
_SUM_ELEMENTS = 2048  # of a program that adds partial sums


@dataclass(frozen=True)
class Tile:
    """States and channels of a program, padded to powers of two, and the steps whose loads it has under way."""

    block_s: int
    block_d: int
    steps: int
    num_warps: int

    def constants(self) -> dict[str, int]:
        return {"BLOCK_S": self.block_s, "BLOCK_D": self.block_d, "STEPS": self.steps}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def tile(kernel: str, S: int) -> Tile:
    """kernel: "forward", of 32 states in a thread at most; "backward", of 16, which keeps those of each step."""
    block_s = triton.next_power_of_2(S)
    if kernel == "forward":
        block_d = 64 if block_s <= 16 else 32
        return Tile(block_s, block_d, 8 if block_s == 1 else 2, max(1, block_s * block_d // 1024))
    block_d = 32 if block_s <= 128 else 16
    return Tile(block_s, block_d, 4 if block_s <= 8 else 2, max(1, block_s * block_d // 512))


def chunks_of(programs: int, L: int) -> tuple[int, int]:
    """(chunks, steps of each): several where so few programs leave the device idle, as all but the last go twice."""
    wanted = PROGRAMS // programs
    chunks = 1 if wanted < 3 else min(wanted, MOST_CHUNKS, triton.cdiv(L, SEGMENT))
    length = triton.cdiv(triton.cdiv(L, chunks), SEGMENT) * SEGMENT
    return triton.cdiv(L, length), length


def _dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(t: Tensor) -> tuple[int, ...]:
    """Of (N, G, L); those of dimensions of one element as 0, so that scans share an x."""
    return tuple(stride if size > 1 else 0 for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True))


def _vector(*tensors: Tensor) -> int:
    """Elements that divide all strides, up to a 16-byte access."""
    strides = (stride for t in tensors for stride in _strides(t))
    return math.gcd(VECTOR_BYTES // tensors[0].element_size(), *strides)


def _sum(partials: Tensor, out: Tensor, P: int, Q: int) -> Tensor:
    """out, P times so many elements, of partials that have each Q times."""
    R = out.numel() // P
    block_q = min(16, triton.next_power_of_2(Q))
    block_r = _SUM_ELEMENTS // block_q
    sum_partials[(P * triton.cdiv(R, block_r),)](
        partials, out, Q, R, VEC=1 if R % 4 else 4, BLOCK_Q=block_q, BLOCK_R=block_r
    )
    return out


def _visited(order: Tensor) -> Tensor:
    G, L = order.shape
    visited = torch.zeros((G, L), dtype=torch.int8, device=order.device)
    mark_tokens[(G, triton.cdiv(L, 1024))](order, visited, L, BLOCK=1024)
    return visited


def _clear(out: Tensor, visited: Tensor) -> None:
    """Zeros in out (..., G, L, W) where no step wrote."""
    (G, L), W = visited.shape, out.shape[-1]
    clear_unvisited[(G, triton.cdiv(L, _TOKENS))](
        out, visited, G, L, W, out.numel() // (G * L * W), BLOCK_T=_TOKENS, BLOCK_W=32
    )


class _Scan:
    """The arguments that every kernel takes, of valid tensors."""

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, bias: Tensor,
                 order: Tensor) -> None:  # fmt: skip
        self.x, self.delta, self.B, self.C = (_dense(t) for t in (x, delta, B, C))
        self.A, self.order = A.transpose(1, 2).contiguous(), order.contiguous()
        self.skip, self.bias = skip.contiguous(), bias.contiguous()
        self.N, self.G, self.L, self.D = delta.shape
        self.S, self.shared = A.shape[2], x.shape[1] == 1 < delta.shape[1]
        self.vector = _vector(self.B, self.C)
        self.visited = _visited(self.order)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def per_scan(self) -> Tensor:
        """For y or dx of each scan, which are rounded when they are added."""
        return self.empty(self.N, self.G, self.L, self.D, dtype=torch.float32 if self.shared else self.x.dtype)

    def over_scans(self, t: Tensor) -> Tensor:
        """The sum over the scans of a shared x."""
        if not self.shared:
            return t
        return _sum(t, self.empty(self.N, 1, self.L, self.D, dtype=self.x.dtype), self.N, self.G)

    def blocks(self, tile: Tile) -> int:
        return triton.cdiv(self.D, tile.block_d)

    def chunks(self, tile: Tile) -> tuple[int, int]:
        return chunks_of(self.N * self.G * self.blocks(tile), self.L)

    def sizes(self, chunks: int, length: int) -> tuple[int, ...]:
        return self.G, self.L, self.D, chunks, length

    def constants(self, tile: Tile) -> dict[str, int]:
        return {"S": self.S, "VEC": self.vector, **tile.constants(), **tile.options()}

    def ends(self, chunks: int, length: int, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What chunk_ends makes: forward, or of a gradient in reverse; empty for one chunk."""
        several = chunks if chunks > 1 else 0
        ends = self.empty(self.N, self.G, several, self.S, self.D)
        sums = self.empty(self.N, self.G, several, self.D)
        if several:
            how, (v, w) = tile("forward", self.S), (self.x, self.B) if dy is None else (dy, self.C)
            chunk_ends[(self.N * self.G * (chunks - 1) * self.blocks(how),)](
                v, self.delta, self.A, w, self.bias, self.order, ends, sums, *self.sizes(chunks, length),
                *_strides(v), *_strides(self.delta), *_strides(w), REVERSE=dy is not None, **self.constants(how),
            )  # fmt: skip
        return ends, sums

    def run(self, out: Tensor, chunks: int, length: int, every: int) -> None:
        """scan_fwd into `out`."""
        ends, how = self.ends(chunks, length), tile("forward", self.S)
        scan_fwd[(self.N * self.G * chunks * self.blocks(how),)](
            self.x, self.delta, self.A, self.B, self.C, self.skip, self.bias, self.order, *ends, out,
            *self.sizes(chunks, length), *(s for t in (self.x, self.delta, self.B, self.C) for s in _strides(t)),
            EVERY=every, **self.constants(how),
        )  # fmt: skip


def forward(x: Tensor, *others: Tensor) -> Tensor:
    """y of valid inputs, contiguous. The same bits in every run: no atomics."""
    if x.numel() == 0:
        return x.new_empty(x.shape)
    with _guard(x):
        scan = _Scan(x, *others)
        y = scan.per_scan()
        scan.run(y, *scan.chunks(tile("forward", scan.S)), every=0)
        _clear(y, scan.visited)
        return scan.over_scans(y)


def backward(dy: Tensor, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The gradients of valid inputs but for `order`, contiguous. The same bits in every run: no atomics."""
    if x.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (x, *others[:-1]))
    with _guard(x):
        scan, dy, how = _Scan(x, *others), _dense(dy), tile("backward", others[1].shape[2])
        N, G, L, D, S, blocks = scan.N, scan.G, scan.L, scan.D, scan.S, scan.blocks(how)
        chunks, length = scan.chunks(how)
        states = scan.empty(N, G, triton.cdiv(L, SEGMENT), S, D)
        scan.run(states, chunks, length, SEGMENT)
        programs = N * G * chunks * blocks
        scratch = scan.empty(programs, SEGMENT // how.steps, how.block_s, how.block_d)
        dx, ddelta = scan.per_scan(), scan.empty(N, G, L, D, dtype=x.dtype)
        dB, dC = (scan.empty(N, blocks, G, L, S) for _ in "BC")
        partials = scan.empty(G, N * chunks, S + 2, D)
        scan_bwd[(programs,)](
            dy, scan.x, scan.delta, scan.A, scan.B, scan.C, scan.skip, scan.bias, scan.order, states,
            *scan.ends(chunks, length, dy), scratch, dx, ddelta, dB, dC, partials, *scan.sizes(chunks, length),
            *(s for t in (dy, scan.x, scan.delta, scan.B, scan.C) for s in _strides(t)), EVERY=SEGMENT,
            **scan.constants(how),
        )  # fmt: skip
        for t in (dx, ddelta, dB, dC):
            _clear(t, scan.visited)
        of_B, of_C = (_sum(t, scan.empty(N, G, L, S, dtype=x.dtype), N, blocks) for t in (dB, dC))
        parameters = _sum(partials, scan.empty(G, S + 2, D), G, N * chunks)
        dA, dskip, dbias = (
            t.clone(memory_format=torch.contiguous_format)
            for t in (parameters[:, :S].transpose(1, 2), parameters[:, S], parameters[:, S + 1])
        )
        return scan.over_scans(dx), ddelta, dA, of_B, of_C, dskip, dbias
