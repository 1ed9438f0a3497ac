"""What `mambaout-kernels audit` prints of the split block's kernels (triton_block.py)."""

from collections.abc import Sequence
from typing import Any

from ..benchmarking import shapes
from .devices import device
from .roofline import Prediction
from .triton_block import Compiled, bound, filled_up

HEADINGS = (
    "target", "kernel", "dtype", "stage", "tile", "warps", "regs", "spills", "shared", "16-byte ld/st", "tensor cores",
    "programs/SM", "at least us", "bound by", "gates",
)  # fmt: skip


def bound_of(compiled: Compiled, variant: str, batch: int) -> tuple[str, Prediction | None]:
    """(stage, bound) at the variant's stage of this width; no bound of AMD's, whose code is not read so far."""
    stage = next(s for s in shapes.stages(variant) if s.dim == compiled.kernel.dim)
    if compiled.kernel.target.startswith("gfx"):
        return stage.label, None
    return stage.label, bound(compiled, filled_up(stage, batch, compiled.kernel.dtype))


def lines(found: Sequence[Compiled], variant: str, batch: int) -> list[tuple[str, ...]]:
    """Cells of the table, under HEADINGS."""
    return [_line(compiled, *bound_of(compiled, variant, batch)) for compiled in found]


def _line(compiled: Compiled, label: str, least: Prediction | None) -> tuple[str, ...]:
    kernel, tile = compiled.kernel, compiled.kernel.tile
    sides = (tile.block_h, tile.block_w, tile.block_d) if kernel.name == "depthwise" else (tile.block_m, tile.block_n)
    warp = 64 if kernel.target.startswith("gfx") else 32
    return (
        kernel.target if least is None else device(kernel.target).name,
        kernel.name,
        kernel.dtype,
        label,
        "x".join(str(side) for side in sides if side),
        str(compiled.threads // warp),
        str(compiled.registers),
        str(compiled.spills),
        str(compiled.shared_bytes),
        f"{compiled.loads[16]}/{compiled.stores[16]}",
        compiled.tensor,
        "" if least is None else str(compiled.resident_blocks),
        "" if least is None else f"{least.microseconds:.0f}",
        "" if least is None else least.bound_by,
        "; ".join(compiled.failures) or "pass",
    )


def as_dict(compiled: Compiled, variant: str, batch: int) -> dict[str, Any]:
    label, least = bound_of(compiled, variant, batch)
    kernel = compiled.kernel
    return {
        "backend": "triton", "kernel": kernel.name, "target": kernel.target, "dtype": kernel.dtype, "stage": label,
        "registers": compiled.registers, "spills": compiled.spills, "shared_bytes": compiled.shared_bytes,
        "loads": dict(compiled.loads), "stores": dict(compiled.stores), "tensor_cores": compiled.tensor,
        "limits_us": None if least is None else least.limits, "failures": compiled.failures,
    }  # fmt: skip
