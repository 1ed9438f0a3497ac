"""tune: times every candidate tile of the Triton kernels on this GPU, and writes the winners as a table."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from .. import backends
from .terminal import UsageError, check_writable, comma_list, positive, printable, progress, show_table, writing


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "tune",
        help="choose the Triton kernels' tiles on this GPU",
        description="Times candidate tiles on the stages of a variant and writes a table to the user's cache, where "
        "every process finds it and puts it before the shipped one; a table elsewhere is put to use by "
        "mambaout_kernels.backends.warmup.load_tiles(FILE). Needs a GPU.",
    )
    command.add_argument("--variant", default="mambaout_tiny", help="default: %(default)s")
    command.add_argument("--batch", type=positive, default=32, help="default: %(default)s")
    command.add_argument("--dtype", type=comma_list(str), default=["float32", "bfloat16"], metavar="NAME,..")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: ~/.cache/mambaout-kernels/tiles.json")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    reason = backends.load("triton").unavailable()
    if reason is not None:
        raise UsageError(f"tune cannot run here: {reason}")
    if not torch.cuda.is_available():
        raise UsageError("tune cannot run here: it times kernels on a GPU, and torch sees none")
    from ..backends.triton_kernels import tiles
    from ..backends.triton_kernels.tune import DTYPES, tune
    from ..benchmarking import shapes

    if args.variant not in shapes.variants():
        raise UsageError(f"--variant must be one of {', '.join(shapes.variants())}; got {args.variant!r}")
    unknown = set(args.dtype) - set(DTYPES)
    if unknown:
        raise UsageError(f"--dtype must be in {', '.join(DTYPES)}; got {', '.join(sorted(unknown))}")
    out = args.out or tiles.cache_path()
    check_writable("--out", out)
    stages = [(s.height, s.width, s.hidden, s.conv_channels, s.act) for s in shapes.stages(args.variant)]
    with progress(len(stages) * len(args.dtype)) as announce:
        rows, lines = tune(stages, args.batch, [DTYPES[name] for name in args.dtype], announce)
    tuned = {row.arch for row in rows}
    others = [row for row in tiles.cached() if row.arch not in tuned] if args.out is None else []
    with writing("--out", out):
        out.write_text(json.dumps(tiles.as_json([*rows, *others]), indent=1) + "\n", encoding="utf-8")
    show_table("Fastest tiles", ("kernel", "bits", "width", "tile", "ms", "shipped ms"), lines)
    print(f"wrote {printable(str(out))}")
    return 0
