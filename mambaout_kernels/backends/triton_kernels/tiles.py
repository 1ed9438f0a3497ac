"""Which tile each kernel is launched with: tiles.json, by architecture, size of the elements, alignment, and width."""

import functools
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

KERNELS = ("forward", "gate_backward", "input_gradient", "weight_gradient")
LARGEST_FAST_FILTER = 7  # above, rows are not shared between outputs
VECTOR_BYTES = 16  # what a thread loads at once, where all offsets are multiples of it: "aligned"


@dataclass(frozen=True)
class Tile:
    """Output rows, columns and channels of one program, and the warps that compute them.

    stages: rows of the identity branch that are on their way to shared memory together; 0: to registers.
    programs: of the weight gradient only, about how many share the work.
    """

    block_w: int
    block_d: int
    num_warps: int
    block_h: int = 1
    stages: int = 0
    programs: int = 0

    def per_thread(self) -> int:
        """Elements of a row of the tile that a thread has, at most: a warp has 32 threads or 64."""
        return max(1, self.block_w * self.block_d // (32 * self.num_warps))

    def options(self) -> dict[str, int]:
        """The compiler's, as launches and the audit give them. Fusing multiply and add is not left to its defaults."""
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Row:
    """A line of tiles.json: the tile for maps up to max_width wide, of elements of `bits`, on `arch` or on any.

    aligned: only for shapes with 16-byte accesses, or only for the others; None: for both.
    """

    arch: str
    kernel: str
    bits: int
    tile: Tile
    aligned: bool | None = None
    max_width: int | None = None


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What parse reads."""

    def short(item: Any) -> dict[str, Any]:
        defaults = {f.name: f.default for f in fields(item)}
        return {name: value for name, value in asdict(item).items() if value != defaults[name]}

    return [{**short(row), "tile": short(row.tile)} for row in rows]


def parse(content: str) -> tuple[Row, ...]:
    """Rows of a table as in tiles.json. ValueError for anything else."""
    try:
        rows = tuple(Row(**{**row, "tile": Tile(**row["tile"])}) for row in json.loads(content))
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"not a table of tiles: {error}") from None
    for row in rows:
        if row.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {row.kernel!r}")
        sizes = (row.tile.block_h, row.tile.block_w, row.tile.block_d, row.tile.num_warps)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes of a tile must be positive integers; got {row.tile}")
        if any(size & (size - 1) for size in sizes[1:]):
            raise ValueError(f"block_w, block_d and num_warps must be powers of two; got {row.tile}")
    return rows


def group(K: int) -> int:
    """Rows of the filter that one program of the weight gradient takes."""
    return K if K <= LARGEST_FAST_FILTER else 1


@functools.cache
def shipped() -> tuple[Row, ...]:
    return parse((files(__package__) / "tiles.json").read_text(encoding="utf-8"))


def cache_path() -> Path:
    """Where `mambaout-kernels tune` leaves its table, and where every process looks for one."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mambaout-kernels" / "tiles.json"


@functools.cache
def cached() -> tuple[Row, ...]:
    """The rows of cache_path(); none, with a warning, where that file is not a table."""
    path = cache_path()
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is not used: {error}; `mambaout-kernels tune` writes it anew", RuntimeWarning, 2)
        return ()


_preferred: tuple[Row, ...] = ()


def use(rows: tuple[Row, ...]) -> None:
    """Put these rows before the tuned and the shipped ones, for this process."""
    global _preferred
    _preferred = rows
    choose.cache_clear()


@functools.cache
def choose(arch: str, kernel: str, bits: int, width: int, K: int, aligned: bool) -> Tile:
    """The first row that fits; filters above 7 x 7 take one output row at a time."""
    for row in (*_preferred, *cached(), *shipped()):
        if (
            row.arch in (arch, "any")
            and (row.kernel, row.bits) == (kernel, bits)
            and row.aligned in (aligned, None)
            and (row.max_width is None or width <= row.max_width)
        ):
            tile = row.tile
            break
    else:
        raise LookupError(f"tiles.json has no tile for {kernel} of {bits}-bit elements")
    if K <= LARGEST_FAST_FILTER or kernel == "weight_gradient":
        return tile
    return Tile(tile.block_w, tile.block_d, 2 * tile.num_warps)
