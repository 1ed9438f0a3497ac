"""What `mambaout-kernels audit` prints: each shipped kernel as compiled, its gates, and predictions for the family."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..benchmarking import shapes
from . import shortfalls
from .devices import device
from .record import CompiledKernel
from .roofline import Prediction, Shape, channel_programs, floor_elements, l2_elements, partial_bytes, predict
from .table import LEAST_SHARE, Row, failures, row


@dataclass(frozen=True)
class Stage:
    """A prediction for one stage of a variant."""

    label: str
    shape: Shape
    prediction: Prediction
    bytes_per_pixel: float  # DRAM, by construction
    l2_bytes_per_pixel: float


@dataclass(frozen=True)
class Entry:
    row: Row
    failures: list[str]
    stages: list[Stage]

    @property
    def unknown(self) -> list[str]:
        """Failures beyond those that are known of the shipped kernels."""
        return shortfalls.unknown(self.row.kernel, self.failures)

    def as_dict(self) -> dict[str, Any]:
        kernel, found = self.row.kernel, self.row
        return {
            "backend": kernel.backend,
            "kernel": kernel.name,
            "dtype": kernel.dtype,
            "target": kernel.target,
            "filter": kernel.K,
            "activation": kernel.act,
            "aligned": kernel.aligned,
            "tile": [kernel.block_h, kernel.block_w, kernel.block_d],
            "threads": kernel.threads,
            "registers": found.registers,
            "spills": found.spills,
            "shared_bytes": kernel.shared_bytes,
            "loads": dict(found.loads),
            "stores": dict(found.stores),
            "multiply_adds_per_output": found.multiply_adds,
            "barriers_in_main_loop": found.barriers,
            "occupancy": found.occupancy,
            "bytes_in_flight": found.bytes_in_flight,
            "failures": self.failures,
            "known": sorted(set(self.failures) - set(self.unknown)),
            "stages": [
                {
                    "label": s.label,
                    "predicted_us": s.prediction.microseconds,
                    "bound_by": s.prediction.bound_by,
                    "share_of_dram_roofline": s.prediction.share,
                    "dram_bytes_per_pixel": s.bytes_per_pixel,
                    "l2_bytes_per_pixel": s.l2_bytes_per_pixel,
                }
                for s in self.stages
            ],
        }


def _family(variant: str, batch: int) -> Iterator[tuple[str, Shape]]:
    for stage in shapes.stages(variant):
        yield stage.label, Shape(batch, stage.height, stage.width, stage.hidden, stage.conv_channels)


def _stage(kernel: CompiledKernel, found: Row, label: str, shape: Shape, programs: int) -> Stage:
    if kernel.name == "weight_gradient":  # its loops run over the maps
        shares = max(1, programs // channel_programs(kernel, shape))
        items = -(-shape.N * shape.W // kernel.block_w)
        found = row(kernel, shape.H, max(1.0, items / shares))
    elements = floor_elements(kernel.name, shape) * kernel.element_bytes
    return Stage(
        label,
        shape,
        predict(kernel, found.executed, shape, device(kernel.target), programs),
        elements + partial_bytes(kernel, shape, programs) / shape.pixels,
        l2_elements(kernel, shape) * kernel.element_bytes,
    )


def aligned(shape: Shape, element_bytes: int) -> bool:
    """Whether every branch of every pixel begins and ends at a multiple of 16 bytes, in a contiguous u."""
    return shape.D * element_bytes % 16 == 0 and shape.C * element_bytes % 16 == 0


def entry(kernel: CompiledKernel, variant: str = "mambaout_tiny", batch: int = 128, programs: int = 512) -> Entry:
    """Read one kernel, for those of the variant's stages that launch it. `programs`: sharing the weight gradient."""
    found = row(kernel)
    stages = []
    if kernel.cubin is not None:
        stages = [
            _stage(kernel, found, label, shape, programs)
            for label, shape in _family(variant, batch)
            if aligned(shape, kernel.element_bytes) == kernel.aligned
        ]
    broken = failures(found)
    if kernel.name == "forward":
        broken += [
            f"{s.label}: {s.prediction.share:.0%} of the DRAM roofline, by {s.prediction.bound_by}"
            for s in stages
            if s.prediction.share < LEAST_SHARE
        ]
    return Entry(found, broken, stages)


SUMMARY_HEADINGS = ("target", "kernel", "compiled", "registers", "spills", "least of DRAM", "gates")


def summary_lines(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Cells of the short table, under SUMMARY_HEADINGS: a line for each kernel and target."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        groups.setdefault((e.row.kernel.target, f"{e.row.kernel.backend} {e.row.kernel.name}"), []).append(e)
    return [
        (
            *key,
            str(len(group)),
            str(max(e.row.registers for e in group)),
            str(max(e.row.spills for e in group)),
            _least_share(group),
            _verdict(group),
        )
        for key, group in groups.items()
    ]


def _least_share(group: Sequence[Entry]) -> str:
    shares = [s.prediction.share for e in group for s in e.stages]
    return f"{min(shares):.0%}" if shares else ""


def _verdict(group: Sequence[Entry]) -> str:
    if failed := sum(bool(e.unknown) for e in group):
        return f"FAILED: {failed} of {len(group)}"
    known = sum(bool(e.failures) for e in group)
    return f"pass, {known} known to be short" if known else "pass"


def remarks(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each failure, and for each reason of known ones."""
    found: dict[str, None] = {}
    for e in entries:
        kernel = e.row.kernel
        name = f"{kernel.target} {kernel.backend} {kernel.name}"
        for failure in e.failures:
            why = shortfalls.reason(kernel, failure)
            text = f"FAILED: {name} {kernel.dtype}: {failure}" if why is None else f"known: {name}: {why}"
            found.setdefault(text)
    return list(found)


HEADINGS = (
    "target", "kernel", "dtype", "shapes", "tile", "warps", "regs", "spills", "shared", "16-byte ld/st", "FMA/output",
    "barriers", "occupancy", "KiB in flight", "gates",
)  # fmt: skip


def lines(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Cells of the first table, under HEADINGS."""
    return [_line(e) for e in entries]


def _line(e: Entry) -> tuple[str, ...]:
    found, kernel = e.row, e.row.kernel
    warp = 64 if kernel.target.startswith("gfx") else 32

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    wide = f"{found.loads[16]}/{found.stores[16]}"
    others = sum(found.loads.values()) + sum(found.stores.values()) - found.loads[16] - found.stores[16]
    return (
        kernel.target,
        f"{kernel.backend} {kernel.name}",
        kernel.dtype,
        "aligned" if kernel.aligned else "others",
        f"{kernel.block_h}x{kernel.block_w}x{kernel.block_d}",
        str(kernel.threads // warp),
        str(found.registers),
        str(found.spills),
        str(kernel.shared_bytes),
        wide + (f" +{others} narrow" if others else ""),
        shown(found.multiply_adds, ".1f"),
        shown(found.barriers, "d"),
        shown(found.occupancy, ".0%"),
        shown(found.bytes_in_flight and found.bytes_in_flight / 1024, ".0f"),
        "; ".join(e.failures) or "pass",
    )


STAGE_HEADINGS = ("device", "kernel", "dtype", "stage", "bytes/pixel", "from L2", "predicted us", "of DRAM", "bound by")


def stage_lines(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """Cells of the second table, under STAGE_HEADINGS."""
    return [
        (
            device(e.row.kernel.target).name,
            f"{e.row.kernel.backend} {e.row.kernel.name}",
            e.row.kernel.dtype,
            s.label,
            f"{s.bytes_per_pixel:.0f}",
            f"{s.l2_bytes_per_pixel:.0f}",
            f"{s.prediction.microseconds:.0f}",
            f"{s.prediction.share:.0%}",
            s.prediction.bound_by,
        )
        for e in entries
        for s in e.stages
    ]


def markdown(title: str, headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for a note; empty without cells."""
    if not cells:
        return ""
    rows = [headings, ["---"] * len(headings), *cells]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
