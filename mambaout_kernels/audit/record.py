"""A compiled kernel of any backend, as the audit takes it: machine code, and what one block of threads owns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one dtype and target. Give `cubin` (NVIDIA) or `assembly` (AMD).

    name: "forward", "gate_backward", "input_gradient" or "weight_gradient", which says what bytes it moves.
    block_h, block_w, block_d: output rows, columns and channels of one block; the columns of all images are counted
    through. weight_gradient: block_h is 1, for a block walks down the image; parts: of the filter, blocks for the same
    pixels and channels.
    """

    backend: str
    name: str
    dtype: str
    target: str
    threads: int
    shared_bytes: int
    K: int
    act: str
    block_h: int
    block_w: int
    block_d: int
    parts: int = 1
    aligned: bool = True
    cubin: bytes | None = None
    assembly: str | None = None

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def outputs_per_thread(self) -> float:
        return self.block_h * self.block_w * self.block_d / self.threads
