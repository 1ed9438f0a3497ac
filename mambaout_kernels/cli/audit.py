"""audit: every GPU kernel compiled ahead of time for GPUs that need not be here, and what its machine code says."""

import argparse
import json
from typing import Any

from .terminal import UsageError, comma_list, positive, progress, require, show_table

_SCAN = "selective_scan"


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "audit",
        help="the GPU kernels' machine code, without a GPU",
        description="Compiles every shipped configuration of the Triton kernels ahead of time, takes the CUDA C++ "
        "kernels from the compiled module, and reads registers, spills, access widths and loads in flight from the "
        "machine code. Times are predicted from datasheets, not measured. Exit status 1 when a kernel does not pass a "
        "gate, but for what is known of the shipped kernels (audit/shortfalls.json).",
    )
    command.add_argument("--backend", type=comma_list(str), metavar="NAME,..", help="triton,cuda; default: those here")
    command.add_argument("--target", type=comma_list(str), metavar="ARCH,..", help="sm_90,gfx942; default: all")
    command.add_argument(
        "--kernel", type=comma_list(str), metavar="NAME,..",
        help="forward,..; default: the op's; norm_linear,depthwise,gated_mlp,layer_norm,gated_linear: of whole blocks; "
        "selective_scan: what MambaOut is compared with",
    )  # fmt: skip
    command.add_argument("--dtype", type=comma_list(str), metavar="NAME,..", help="bfloat16,..; default: all")
    command.add_argument("--variant", default="mambaout_tiny", help="whose stages are predicted; default: %(default)s")
    command.add_argument("--batch", type=positive, default=128, help="default: %(default)s")
    command.add_argument("--all", action="store_true", help="filters 3, 5 and 7 wide, and every activation: minutes")
    shown = command.add_mutually_exclusive_group()
    shown.add_argument("--details", action="store_true", help="a line for each configuration, and for each stage")
    shown.add_argument("--json", action="store_true", help="as JSON on stdout")
    shown.add_argument("--markdown", action="store_true", help="tables as Markdown on stdout")
    command.set_defaults(run=run)


def _chosen(name: str, wanted: list[str] | None, allowed: tuple[str, ...]) -> tuple[str, ...]:
    unknown = set(wanted or ()) - set(allowed)
    if unknown:
        raise UsageError(f"{name} must be in {', '.join(allowed)}; got {', '.join(sorted(unknown))}")
    return tuple(wanted or allowed)


def _compiled(args: argparse.Namespace, targets: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Any]:
    """The CUDA C++ kernels of the compiled module; none where it was not built, unless they were asked for."""
    from ..audit import cuda, cuda_entries
    from ..audit.devices import devices

    module = cuda.module_path()
    if module is None:
        if args.backend:
            raise UsageError("the CUDA module is not built: it needs nvcc at installation")
        return []
    wanted = [d.target for d in devices() if d.target in targets]
    sizes = (3, 5, 7) if args.all else (7,)
    try:
        return cuda_entries.entries(module, wanted, dtypes, sizes, args.variant, args.batch) if wanted else []
    except (ImportError, FileNotFoundError) as error:
        raise UsageError(str(error)) from None


def _scans(targets: tuple[str, ...], dtypes: tuple[str, ...]) -> list[Any]:
    """The selective scan's kernels for NVIDIA's of the targets, of VMamba-T's first stage, with 16 states and 1."""
    from ..comparators import scan_report

    wanted = [
        scan_report.ScanKernel(name, target, dtype, 192, states)
        for target in targets
        if target.startswith("sm_")
        for dtype in dtypes
        for states in (16, 1)
        for name in scan_report.KERNELS
    ]
    with progress(len(wanted)) as announce:
        found = []
        for kernel in wanted:
            announce(f"{kernel.target} {kernel.name} {kernel.dtype} {kernel.S}")
            try:
                found.append(scan_report.compile_ahead(kernel))
            except (RuntimeError, FileNotFoundError) as error:
                raise UsageError(str(error)) from None
    return found


def _as_dict(compiled: Any) -> dict[str, Any]:
    from ..comparators import scan_report

    return dict(zip(scan_report.HEADINGS, scan_report.lines([compiled])[0], strict=True))


def _scan_table(compiled: list[Any]) -> tuple[Any, ...]:
    from ..comparators import scan_report

    title = "The selective scan: four scans of 56 x 56 tokens, batch 128. Predicted, not measured"
    return title, scan_report.HEADINGS, scan_report.lines(compiled)


def run(args: argparse.Namespace) -> int:
    require("triton", "triton", "cli", "audit")
    from ..audit import block_report, report, triton, triton_block
    from ..backends.triton_kernels import tiles
    from ..benchmarking import shapes
    from ..reference import ACTIVATIONS

    if args.variant not in shapes.variants():
        raise UsageError(f"--variant must be one of {', '.join(shapes.variants())}; got {args.variant!r}")
    chosen = _chosen("--backend", args.backend, ("triton", "cuda"))
    of_op = (*tiles.KERNELS, "backward")
    kernels = _chosen("--kernel", args.kernel or list(of_op), (*of_op, *triton_block.KERNELS, _SCAN))
    targets = _chosen("--target", args.target, triton.TARGETS)
    dtypes = _chosen("--dtype", args.dtype, tuple(triton.DTYPES))
    todo = [
        c
        for c in triton.configurations(targets, (3, 5, 7) if args.all else (7,), ACTIVATIONS if args.all else ("gelu",))
        if "triton" in chosen and c.kernel in kernels and c.dtype in dtypes
    ]
    split = triton_block.configurations(targets, dtypes, args.variant, kernels) if "triton" in chosen else []
    entries: list[Any] = []
    blocks: list[Any] = []
    with progress(len(todo) + len(split)) as announce:
        for c in todo:
            announce(f"{c.target} {c.kernel} {c.dtype} {c.K}x{c.K} {c.act}")
            programs = c.tile.programs
            try:
                entries.append(report.entry(triton.compile_ahead(c), args.variant, args.batch, programs))
            except (RuntimeError, FileNotFoundError) as error:
                raise UsageError(str(error)) from None
        for kernel in split:
            announce(f"{kernel.target} {kernel.name} {kernel.dtype} {kernel.dim}")
            blocks.append(triton_block.compile_ahead(kernel))
    scans = _scans(targets, dtypes) if _SCAN in kernels and "triton" in chosen else []
    if "cuda" in chosen:
        entries += [e for e in _compiled(args, targets, dtypes) if args.kernel is None or e.row.kernel.name in kernels]
    failed = any(e.unknown for e in entries) or any(b.failures for b in (*blocks, *scans))
    if args.json:
        of_blocks = [block_report.as_dict(b, args.variant, args.batch) for b in blocks]
        print(json.dumps([*(e.as_dict() for e in entries), *of_blocks, *map(_as_dict, scans)], indent=1))
        return int(failed)
    title = f"Predicted, not measured: {args.variant}, batch {args.batch}"
    of_blocks_table = (
        f"The block in inference. {title}",
        block_report.HEADINGS,
        block_report.lines(blocks, args.variant, args.batch),
    )
    if args.markdown or args.details:
        tables = [
            ("As compiled", report.HEADINGS, report.lines(entries)),
            (title, report.STAGE_HEADINGS, report.stage_lines(entries)),
            of_blocks_table,
        ]
    else:
        summary = f"As compiled; the smallest predicted share of the DRAM roofline, {args.variant}, batch {args.batch}"
        tables = [(summary, report.SUMMARY_HEADINGS, report.summary_lines(entries)), of_blocks_table]
    if scans:
        tables.append(_scan_table(scans))
    for table in tables:
        if args.markdown:
            print(report.markdown(*table))
        else:
            show_table(*table)
    for remark in report.remarks(entries):
        print(remark)
    return int(failed)
