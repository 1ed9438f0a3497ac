"""Which tile each kernel is launched with: tiles.json, by architecture, size of the elements and width of the maps."""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.resources import files
from typing import Any

KERNELS = ("forward", "gate_backward", "input_gradient", "weight_gradient")
LARGEST_FAST_FILTER = 7  # above, rows are not shared between outputs


@dataclass(frozen=True)
class Tile:
    """Output rows, pixels and channels of one program, and the warps that compute them.

    weight_gradient: block_h is about how many programs share the work. max_registers: 0 leaves them to the compiler.
    """

    block_h: int
    block_w: int
    block_d: int
    num_warps: int
    max_registers: int = 0

    def options(self) -> dict[str, int]:
        """The compiler's, as launches and the audit give them."""
        limit = {"maxnreg": self.max_registers} if self.max_registers else {}
        return {"num_warps": self.num_warps, "num_stages": 1, **limit}


@dataclass(frozen=True)
class Row:
    """A line of tiles.json: the tile for maps up to max_width wide, of elements of `bits`, on `arch` or on any."""

    arch: str
    kernel: str
    bits: int
    max_width: int
    tile: Tile


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What parse reads."""
    return [{**asdict(row), "tile": list(astuple(row.tile))} for row in rows]


def parse(content: str) -> tuple[Row, ...]:
    """Rows of a table as in tiles.json. ValueError for anything else."""
    try:
        rows = tuple(Row(**{**row, "tile": Tile(*row["tile"])}) for row in json.loads(content))
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a table of tiles: {error}") from None
    for row in rows:
        if row.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {row.kernel!r}")
    return rows


@functools.cache
def shipped() -> tuple[Row, ...]:
    return parse((files(__package__) / "tiles.json").read_text(encoding="utf-8"))


_tuned: tuple[Row, ...] = ()


def use(rows: tuple[Row, ...]) -> None:
    """Put these rows (of `mambaout-kernels tune`) before the shipped ones, for this process."""
    global _tuned
    _tuned = rows
    choose.cache_clear()


@functools.cache
def choose(arch: str, kernel: str, bits: int, width: int, K: int) -> Tile:
    """The first row that fits; filters above 7 x 7 take one output row at a time."""
    for row in (*_tuned, *shipped()):
        if row.arch in (arch, "any") and (row.kernel, row.bits) == (kernel, bits) and width <= row.max_width:
            tile = row.tile
            break
    else:
        raise LookupError(f"tiles.json has no tile for {kernel} of {bits}-bit elements")
    if K <= LARGEST_FAST_FILTER or kernel == "weight_gradient":
        return tile
    return Tile(1, tile.block_w, tile.block_d, 2 * tile.num_warps)
