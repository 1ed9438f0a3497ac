"""mixers: one layer of each token mixer, timed over the number of tokens; where attention becomes the slower one."""

import argparse
import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from ..benchmarking import machine
from .terminal import (
    UsageError,
    WrongResult,
    check_writable,
    comma_list,
    one_of,
    positive,
    positive_seconds,
    printable,
    progress,
    require,
    show_table,
    writing,
)

MOST_TOKENS = 1 << 20


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "mixers",
        help="token mixers beside each other over the number of tokens: time, memory, MACs, crossings",
        description="Times one layer of each token mixer, with random weights, on square maps of more and more tokens: "
        "gated convolution, attention, the scans of state space models, other convolutions. Tells from how many tokens "
        "on attention takes longer than each, beside the paper's L > 6D.",
    )
    command.add_argument(
        "--dim",
        type=comma_list(positive),
        default="96,192,384",
        metavar="D,..",
        help="widths; multiples of 32 for attention, default 96,192,384",
    )
    command.add_argument(
        "--tokens",
        type=lengths,
        default="196..16384",
        metavar="A..B",
        help="from A tokens to B in steps of 4 times, or a list A,B,..; default 196..16384",
    )
    command.add_argument("--mixers", type=comma_list(str), metavar="NAME,..", help="default: all")
    command.add_argument("--batch", type=positive, default=1, help="images, default %(default)s")
    command.add_argument("--dtype", type=one_of(("fp32", "bf16", "fp16")), default="fp32", help="default: %(default)s")
    command.add_argument(
        "--mode",
        type=one_of(("fwd", "train")),
        default="fwd",
        help="fwd, or train: with all gradients; default %(default)s",
    )
    command.add_argument(
        "--block",
        action="store_true",
        help="the whole block: norm, shortcut, and an MLP where a mixer's papers have one",
    )
    command.add_argument("--device", type=one_of(("cpu", "cuda")), default="cpu", help="default: %(default)s")
    command.add_argument("--threads", type=positive, help="of the CPU; default: torch's")
    command.add_argument(
        "--budget",
        type=positive_seconds,
        default=1.0,
        metavar="S",
        help="seconds of each width and length, default %(default)s",
    )
    command.add_argument(
        "--longest",
        type=positive_seconds,
        default=20.0,
        metavar="S",
        help="leave out what would take longer at a time, default %(default)s",
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write mixers.json, mixers.csv and mixers.png there"
    )
    command.set_defaults(run=run)


def lengths(text: str) -> list[int]:
    """An argparse type: "196..16384" or "196,784" as numbers of tokens."""
    match = re.fullmatch(r"(\d{1,10})\.\.(\d{1,10})", text)
    if match is None:
        found = [positive(part.strip()) for part in text.split(",")]
    else:
        low, high = positive(match[1]), positive(match[2])
        if low > high:
            raise argparse.ArgumentTypeError(f"{text!r} goes down; A..B has A of at most B")
        steps = math.ceil(math.log(high / low, 4)) if high > low else 0
        found = [low * 4**i for i in range(steps)] + [high]
    if max(found) > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {MOST_TOKENS:,} tokens")
    return sorted(set(found))


def run(args: argparse.Namespace) -> int:
    from ..comparators import plot_mixers, sweep
    from ..comparators.mixers import MIXERS, create_layer

    names = args.mixers or [name for name, mixer in MIXERS.items() if mixer.unavailable(args.device) is None]
    unknown = [name for name in names if name not in MIXERS]
    if unknown:
        raise UsageError(f"--mixers must be in {', '.join(MIXERS)}; got {', '.join(unknown)}")
    for name in names:
        if (reason := MIXERS[name].unavailable(args.device)) is not None:
            raise UsageError(f"--mixers {name} cannot run: {reason}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    for dim in args.dim:
        for name in names:
            try:
                with torch.device("meta"):
                    create_layer(name, dim)
            except (ValueError, RuntimeError) as error:
                raise UsageError(f"--dim {dim}: {name} cannot be made: {error}") from None
    if args.out is not None:
        require("matplotlib", "matplotlib", "plot", "a plot")
        check_writable("--out", args.out / "mixers.json")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        setting = sweep.Setting(args.batch, args.dtype, args.mode, args.device, args.block)
        for name in names:
            try:
                sweep.check(name, args.dim[0], setting)
            except ValueError as error:
                raise WrongResult(str(error)) from None
        rows: list[sweep.Row] = []
        with progress(len(args.dim) * len(args.tokens)) as announce:
            for found in sweep.sweep(names, args.dim, args.tokens, setting, args.budget, args.longest, announce):
                rows += found
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    about = machine.description()
    hardware = about["gpu"] if args.device == "cuda" else f"{about['cpu']}, {threads} thread{'s' * (threads > 1)}"
    what = "block with norm, shortcut and, where its papers have one, MLP" if args.block else "token mixer"
    kind = {"fwd": "inference", "train": "forward and gradients"}[args.mode]
    title = f"one {what}, {kind}, {args.dtype}, batch {args.batch}; {hardware}; torch {about['torch']}"
    print(f"{title}; commit {about['commit'] or 'unknown'}")
    _show(rows, args)
    if args.out is not None:
        with writing("--out", args.out):
            document = {"machine": about, "threads": threads, "setting": asdict(setting), "rows": [*map(asdict, rows)]}
            (args.out / "mixers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            with (args.out / "mixers.csv").open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(sweep.Row)])
                writer.writeheader()
                writer.writerows(map(asdict, rows))
            plot_mixers.draw(args.out / "mixers.png", rows, title)
        print("written:", ", ".join(printable(str(args.out / f"mixers.{end}")) for end in ("json", "csv", "png")))
    return 0


def _show(rows: Sequence[Any], args: argparse.Namespace) -> None:
    from ..comparators.mixers import MIXERS

    names = list(dict.fromkeys(row.mixer for row in rows))
    for dim in args.dim:
        by_place = {(row.mixer, row.tokens): row for row in rows if row.dim == dim}
        tokens = list(dict.fromkeys(row.tokens for row in by_place.values()))
        show_table(
            f"D = {dim}, 6D = {6 * dim:,}: milliseconds by medians, over the tokens of an image",
            ["", *(f"{length:,}" for length in tokens)],
            [[MIXERS[name].label, *(_milliseconds(by_place[name, length]) for length in tokens)] for name in names],
        )
    of_each = {(row.mixer, row.dim): row for row in rows if row.peak_bytes is not None}  # the longest
    show_table(
        "at the longest of these: MACs of an image (of a scan, as papers count them), bytes that operations read and "
        "write, and that are alive at once",
        ["", "D", "tokens", "parameters", "MACs", "MB moved", "MB alive"],
        [
            [
                MIXERS[name].label,
                str(dim),
                f"{row.tokens:,}",
                f"{row.parameters:,}",
                f"{row.macs / 1e9:.3f}G",
                f"{row.moved_bytes / 1e6:.1f}",
                f"{row.peak_bytes / 1e6:.1f}",
            ]
            for dim in args.dim
            for name in names
            if (row := of_each.get((name, dim)))
        ],
    )
    _show_crossings(rows, args.dim, names)
    for row in rows:
        if row.left_out is not None:
            print(f"left out: {MIXERS[row.mixer].label}, D = {row.dim}, {row.tokens:,} tokens {row.left_out}")


def _show_crossings(rows: Sequence[Any], dims: Sequence[int], names: Sequence[str]) -> None:
    from ..comparators.mixers import MIXERS
    from ..comparators.sweep import crossing

    if "attention" not in names:
        return

    def text(dim: int, name: str) -> str:
        own, other = ([row for row in rows if row.dim == dim and row.mixer == each] for each in ("attention", name))
        found = crossing(own, other)
        if found is None:
            return "not measured"
        if math.isinf(found):
            return "at no length here"
        return "at all lengths here" if found == 0 else f"{found:,.0f} ({found / (6 * dim):.2f})"

    show_table(
        "attention takes longer than it from so many tokens on (as a multiple of 6D)",
        ["", *(f"D = {dim}" for dim in dims)],
        [[MIXERS[name].label, *(text(dim, name) for dim in dims)] for name in names if name != "attention"],
    )


def _milliseconds(row: Any) -> str:
    if row.median_s is None:
        return "left out"
    return f"{row.median_s * 1e3:.2f}" if row.median_s < 1 else f"{row.median_s * 1e3:,.0f}"
