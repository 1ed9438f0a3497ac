"""analyze: parameters and MACs beside the paper's, L > 6D for a task, causal mixing, bytes that an op moves."""

import argparse
import json
import re
from typing import Any

from .. import analysis
from ..models import VARIANTS
from .terminal import UsageError, comma_list, one_of, positive, show_table

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def add_to(commands: Any) -> None:
    command = commands.add_parser("analyze", help="parameters, MACs, sequence length, visibility, bytes moved")
    command.add_argument(
        "--variant",
        type=comma_list(one_of(list(VARIANTS))),
        default=list(VARIANTS),
        metavar="A,B",
        help="default: all",
    )
    command.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="of an image, default 224x224")
    command.add_argument("--patch", type=positive, default=analysis.PATCH, help="side of a token, default %(default)s")
    command.add_argument("--dim", type=positive, help="a width D to hold the length against, beside ViT-S and ViT-B")
    command.add_argument("--dtype", type=one_of(list(_ELEMENT_BYTES)), default="fp32", help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=run)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 224 or 800x1280")
    return int(match[1]), int(match[2] or match[1])


def run(args: argparse.Namespace) -> int:
    if max(args.size) > 1 << 16:
        raise UsageError(f"--size must be at most 65536 a side, got {args.size[0]}x{args.size[1]}")
    content = collect(args)
    if args.json:
        print(json.dumps(content, indent=1))
        return 0
    size = f"{args.size[0]}x{args.size[1]}"
    show_table(
        f"parameters, and MACs of convolutions and linear layers at {size}; the paper's at 224x224",
        ["variant", "parameters", "paper", "MACs", "paper"],
        [
            [m["variant"], f"{m['parameters']:,}", *_paper(m["paper"], 0, "M"), f"{m['macs'] / 1e9:.3f}G",
             *_paper(m["paper"], 1, "G")]
            for m in content["models"]
        ],
    )  # fmt: skip
    show_table(
        "is the sequence long? L > 6D (24 D^2 L + 4 D L^2 FLOPs of a Transformer block)",
        ["task", "image", "L", "D", "6D", "L / 6D", "long"],
        [
            [t["task"], f"{t['size'][0]}x{t['size'][1]}", str(t["tokens"]), f"{t['dim']} {t['width']}".strip(),
             str(6 * t["dim"]), f"{t['ratio']:.2f}", "yes" if t["ratio"] > 1 else "no"]
            for t in content["tasks"]
        ],
    )  # fmt: skip
    show_table(
        f"fully visible against causal convolution at {size}: pairs of pixels that see each other",
        ["variant", "stage", "map", "taps", "causal", "pairs", "causal"],
        [
            [v["variant"], str(v["stage"]), f"{v['map'][0]}x{v['map'][1]}", str(v["taps"]), str(v["causal_taps"]),
             f"{v['pairs']:,}", f"{v['causal_pairs'] / v['pairs']:.1%}"]
            for v in content["visibility"]
        ],
    )  # fmt: skip
    show_table(
        f"middle of one block, batch 1, {args.dtype}, {size}: MB moved, and MACs of its convolution",
        ["variant", "stage", "D", "C", "fused", "separate partial", "separate full", "MACs partial", "MACs full"],
        [
            [b["variant"], str(b["stage"]), str(b["hidden"]), str(b["conv_channels"]),
             *(f"{b[key] / 1e6:.2f}" for key in ("fused_bytes", "separate_bytes", "separate_full_bytes")),
             *(f"{b[key] / 1e6:.1f}M" for key in ("macs", "full_macs"))]
            for b in content["traffic"]
        ],
    )  # fmt: skip
    return 0


def _paper(figures: tuple[int, float] | None, which: int, unit: str) -> list[str]:
    return ["" if figures is None else f"{figures[which]}{unit}"]


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """What `analyze --json` prints."""
    height, width = args.size
    tasks = {**analysis.TASKS, "--size": args.size} if args.size != (224, 224) else analysis.TASKS
    widths = {**analysis.WIDTHS, **({"": args.dim} if args.dim else {})}
    content: dict[str, list[Any]] = {"models": [], "tasks": [], "visibility": [], "traffic": []}
    for task, (h, w) in tasks.items():
        length = analysis.tokens(h, w, args.patch)
        for name, dim in widths.items():
            ratio = analysis.length_ratio(length, dim)
            content["tasks"].append(
                {"task": task, "size": (h, w), "tokens": length, "width": name, "dim": dim, "ratio": ratio}
            )
    for name in args.variant:
        content["models"].append(
            {
                "variant": name,
                "parameters": analysis.parameters(name),
                "macs": analysis.macs(name, height, width),
                "paper": analysis.PAPER.get(name),
            }
        )
        for stage in range(len(VARIANTS[name].dims)):
            content["traffic"].append(_traffic(name, stage, args))
    variant = args.variant[0]
    for stage in range(len(VARIANTS[variant].dims)):
        h, w = (-(-side // (4 << stage)) for side in args.size)
        seen = vars(analysis.visibility(h, w, VARIANTS[variant].kernel_size))
        content["visibility"].append({"variant": variant, "stage": stage + 1, "map": (h, w), **seen})
    return content


def _traffic(name: str, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    partial, full = analysis.traffic(name, stage, *args.size)
    element = _ELEMENT_BYTES[args.dtype]
    return {
        "variant": name,
        "stage": stage + 1,
        "hidden": partial.hidden,
        "conv_channels": partial.conv_channels,
        "fused_bytes": partial.fused * element,
        "separate_bytes": partial.separate * element,
        "separate_full_bytes": full.separate * element,
        "macs": partial.macs,
        "full_macs": full.macs,
    }
