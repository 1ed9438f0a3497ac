"""check: every backend that can run here, forward and every gradient, by the policy of benchmarking/accuracy.py."""

import argparse
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..benchmarking import accuracy, error_bounds, shapes
from ..benchmarking.accuracy import Comparison
from ..benchmarking.report import finite
from ..benchmarking.shapes import Shape
from ..benchmarking.workloads import DTYPES
from . import special_values
from .terminal import UsageError, comma_list, one_of, progress, show_table

OUTPUTS = ("y", "du", "dweight", "dbias")


@dataclass(frozen=True)
class Case:
    """One input of the op: u (N, H, W, 2D), weight (C, 1, K, K), dy (N, H, W, D)."""

    label: str
    N: int
    H: int
    W: int
    D: int
    C: int
    K: int
    act: str
    dtype: str
    fp32_parameters: bool = False  # beside a low-precision u
    strided: bool = False  # u and dy are slices of permuted tensors
    bias_scale: float = 1.0


@dataclass(frozen=True)
class Subject:
    """A backend, and for the CPU one the instruction set to run it on."""

    backend: str
    isa: str | None = None

    @property
    def label(self) -> str:
        return f"{self.backend} ({self.isa})" if self.isa else self.backend


@dataclass(frozen=True)
class Finding:
    subject: str
    case: Case
    comparison: Comparison
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.comparison.passed


def add_to(commands: Any) -> None:
    command = commands.add_parser("check", help="every usable backend against fp64; exit status 1 on a failure")
    command.add_argument("--full", action="store_true", help="more shapes, kernel sizes, strides, mixed dtypes and "
                         "special values; errors by stage")  # fmt: skip
    command.add_argument("--backend", type=comma_list(one_of(backends.NAMES)), metavar="NAMES",
                         help="only these, e.g. cpu,triton; default: all that can run here")  # fmt: skip
    command.add_argument("--dtype", type=comma_list(one_of(list(DTYPES))), default=list(DTYPES), metavar="NAMES",
                         help=f"default: {','.join(DTYPES)}")  # fmt: skip
    command.add_argument("--variant", type=one_of(shapes.variants()), default=shapes.variants()[0],
                         help="whose stage shapes; default: %(default)s")  # fmt: skip
    command.add_argument("--json", action="store_true", help="every comparison, as JSON on stdout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    subjects = find_subjects(args.backend)
    cases = list(find_cases(args.variant, args.dtype, args.full))
    findings: list[Finding] = []
    with progress(len(cases)) as step:
        for case in cases:
            step(f"{case.label} {case.act} {case.dtype}")
            findings += check(subjects, case)
    special = check_special_values(subjects, args.dtype) if args.full else {}
    failed = [finding for finding in findings if not finding.passed]
    failed_special = sum(one.failed for found in special.values() for one in found)
    if args.json:
        listed = [{**asdict(finding), "passed": finding.passed} for finding in findings]
        values = [{"subject": s, "dtype": d, **asdict(one)} for (s, d), found in special.items() for one in found]
        content = {"passed": not failed and not failed_special, "findings": listed, "special_values": values}
        print(json.dumps(finite(content), indent=1, allow_nan=False))
    else:
        if args.full:
            _show_by_stage(findings, args.variant)
            special_values.show(special)
        _show(findings, failed, len(cases))
        if failed_special:
            print(f"FAILED: {failed_special} special values")
    return 1 if failed or failed_special else 0


def find_subjects(wanted: Sequence[str] | None) -> list[Subject]:
    status = backends.status()
    for name in wanted or ():
        if status[name] is not None:
            raise UsageError(f"--backend {name} cannot be used here: {status[name]}")
    found: list[Subject] = []
    for name in wanted or [name for name, reason in status.items() if reason is None]:
        if name == "cpu":
            from .. import _C

            found += [Subject("cpu", isa) for isa in _C.supported_cpu_capabilities()]
        else:
            found.append(Subject(name))
    return found


def find_cases(variant: str, dtypes: Sequence[str], full: bool) -> Iterator[Case]:
    for act, dtype in itertools.product(reference.ACTIVATIONS, dtypes):
        for s in shapes.stages(variant):
            yield Case(s.label, 1, s.height, s.width, s.hidden, s.conv_channels, s.kernel_size, act, dtype)
    if not full:
        return
    # Variants that differ in depth alone have the same stages.
    stages: dict[Shape, Shape] = {}
    for s in (s for other in shapes.variants() for s in shapes.stages(other)):
        stages.setdefault(replace(s, variant="", stage=0), s)
    for dtype in dtypes:
        for s in stages.values():
            yield Case(f"{s.variant} {s.label}", 2, s.height, s.width, s.hidden, s.conv_channels, s.kernel_size,
                       s.act, dtype)  # fmt: skip
        small = Case("", 2, 11, 13, 40, 24, 7, "gelu", dtype)
        for K in (1, 3, 5, 9, 11, 31):
            yield replace(small, label=f"{K}x{K} filter", K=K)
        yield replace(small, label="no channel convolved", C=0)
        yield replace(small, label="every channel convolved", C=40)
        yield replace(small, label="odd channels", D=37, C=19)
        yield replace(small, label="one pixel", H=1, W=1)
        yield replace(small, label="strided", strided=True)
        yield replace(small, label="large bias", bias_scale=10.0)
        if dtype in ("bf16", "fp16"):
            yield replace(small, label="fp32 parameters", fp32_parameters=True)


def _inputs(case: Case, device: str) -> tuple[Tensor, ...]:
    """u, weight, bias, dy; gates over [-6, 6], filters whose sums are of order one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def maps(channels: int) -> Tensor:
        if not case.strided:
            return normal(case.N, case.H, case.W, channels)
        return normal(case.N, 2 * channels, case.W, case.H)[:, ::2].permute(0, 3, 2, 1)

    dtype = DTYPES[case.dtype]
    parameters = torch.float32 if case.fp32_parameters else dtype
    weight, bias = normal(case.C, 1, case.K, case.K) / case.K, case.bias_scale * normal(case.C)
    u, dy = 2 * maps(2 * case.D), maps(case.D)
    return u.to(device, dtype), weight.to(device, parameters), bias.to(device, parameters), dy.to(device, dtype)


def _eager(given: tuple[Tensor, ...], act: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    u, weight, bias, dy = (t.to(dtype or t.dtype) for t in given)
    leaves = [t.detach().clone().requires_grad_() for t in (u, weight, bias)]
    with _convolution_of_eager(weight):
        y = reference.gated_dwconv(leaves[0], leaves[1], leaves[2], act)
        gradients = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    return dict(zip(OUTPUTS, (y.detach(), *gradients), strict=True))


@contextmanager
def _convolution_of_eager(weight: Tensor) -> Iterator[None]:
    """PyTorch's convolution that eager's error is measured with; without TF32.

    Beyond 9 x 9 not oneDNN's, which takes minutes to generate code for its gradients. The two add up in different
    orders, and their errors differ by more than twice: the reference is compared on the same one.
    """
    onednn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    with onednn.flags(enabled=weight.shape[-1] <= 9), cudnn.flags(enabled=True, allow_tf32=False):
        yield


def check(subjects: Sequence[Subject], case: Case) -> list[Finding]:
    """Every subject that takes this case, on every output."""
    findings: list[Finding] = []
    by_device: dict[str, tuple[tuple[Tensor, ...], dict[str, Tensor], dict[str, Tensor]]] = {}
    bounds: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for subject in subjects:
        device = "cuda" if subject.backend in ("triton", "cuda") else "cpu"
        if device not in by_device:
            given = _inputs(case, device)
            exact = _eager(given, case.act, torch.float64)
            by_device[device] = given, exact if case.dtype == "fp64" else _eager(given, case.act), exact
        given, eager, exact = by_device[device]
        if not backends.load(subject.backend).supports(*given[:2]):
            continue
        try:
            actual = _outputs(subject, given, case.act)
        except Exception as error:
            nothing = Comparison("all", float("nan"), 0.0, float("nan"), 0.0, 0.0, float("nan"))
            findings.append(Finding(subject.label, case, nothing, f"{type(error).__name__}: {error}"))
            continue
        composed = subject.backend == "reference"
        if (device, composed) not in bounds:
            u, weight, bias, dy = given
            of_outputs = error_bounds.of_op(u, weight, bias, dy, case.act, composed)
            bounds[device, composed] = dict(zip(OUTPUTS, of_outputs, strict=True))
        compared = accuracy.compare_all(actual, eager, exact, bounds[device, composed])
        findings += [Finding(subject.label, case, c) for c in compared]
    return findings


def _outputs(subject: Subject, given: tuple[Tensor, ...], act: str) -> dict[str, Tensor]:
    u, weight, bias, dy = given
    backend = backends.load(subject.backend)
    like_eager = _convolution_of_eager(weight) if subject.backend == "reference" else nullcontext()
    with _isa(subject.isa), like_eager:
        y = backend.gated_dwconv(u, weight, bias, act)
        gradients = backend.gated_dwconv_backward(dy, u, weight, bias, act)
    return dict(zip(OUTPUTS, (y, *gradients), strict=True))


def check_special_values(subjects: Sequence[Subject], dtypes: Sequence[str]) -> special_values.BySubject:
    """By subject and dtype, what becomes of NaN, Inf, subnormals, zeros and large values under every act."""
    found: special_values.BySubject = {}
    for subject, name, act in itertools.product(subjects, dtypes, reference.ACTIVATIONS):
        dtype, device = DTYPES[name], "cuda" if subject.backend in ("triton", "cuda") else "cpu"
        like = torch.empty(0, dtype=dtype, device=device)
        if not backends.load(subject.backend).supports(like, like):
            continue
        found.setdefault((subject.label, name), []).extend(
            special_values.examine(
                act,
                dtype,
                device,
                run=functools.partial(_outputs, subject, act=act),
                eager=functools.partial(_eager, act=act),
                exact=functools.partial(_eager, act=act, dtype=torch.float64),
            )
        )
    return found


@contextmanager
def _isa(name: str | None) -> Iterator[None]:
    if name is None:
        yield
        return
    from .. import _C

    before = _C.cpu_capability()
    _C.set_cpu_capability(name)
    try:
        yield
    finally:
        _C.set_cpu_capability(before)


def _show_by_stage(findings: Sequence[Finding], variant: str) -> None:
    """Largest and mean errors of every backend, dtype, stage of the variant and output, over the activations."""
    stages = [shape.label for shape in shapes.stages(variant)]
    groups: dict[tuple[str, str, str], dict[str, list[Comparison]]] = {}
    for finding in findings:
        if finding.case.label in stages and finding.failure is None:
            group = groups.setdefault((finding.subject, finding.case.dtype, finding.case.label), {})
            group.setdefault(finding.comparison.name, []).append(finding.comparison)

    def errors(found: list[Comparison]) -> str:
        ours, theirs = max(c.error for c in found), max(c.eager_error for c in found)
        means = (max(c.mean_error for c in found), max(c.eager_mean_error for c in found))
        return f"{ours:.1e} / {theirs:.1e}; {means[0]:.1e} / {means[1]:.1e}"

    lines = [[*key, *(errors(group[name]) for name in OUTPUTS)] for key, group in groups.items()]
    title = f"{variant}: largest error against fp64 / eager's; mean error / eager's"
    show_table(title, ["backend", "dtype", "stage", *OUTPUTS], lines)


def _show(findings: Sequence[Finding], failed: Sequence[Finding], cases: int) -> None:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in sorted(findings, key=lambda finding: finding.subject):
        groups.setdefault((finding.subject, finding.case.dtype), []).append(finding)
    lines = []
    for (subject, dtype), members in groups.items():
        line = [subject, dtype]
        for name in OUTPUTS:
            found = [finding for finding in members if finding.comparison.name == name]
            line.append(_errors(_nearest(found)) if found else "")
        nearest, wrong = _nearest(members), sum(not finding.passed for finding in members)
        line.append(f"{nearest.comparison.excess:.0%} of allowed: {nearest.comparison.name}, {_place(nearest)}")
        lines.append([*line, f"FAILED {wrong} of {len(members)}" if wrong else f"ok, {len(members)} of {len(members)}"])
    headings = ["backend", "dtype", *OUTPUTS, "nearest to its limit", "result"]
    show_table(f"largest error against fp64 / eager's own, over {cases} inputs", headings, lines)
    details = [
        [
            f.subject,
            f.case.dtype,
            f.comparison.name,
            _place(f),
            f.failure or f"{_errors(f)}; {f.comparison}",
        ]
        for f in failed[:20]
    ]
    headings = ["backend", "dtype", "of", "input", "error / eager's; what is wrong"]
    show_table(f"the first {len(details)} of {len(failed)} failures", headings, details)
    print(f"FAILED: {len(failed)} of {len(findings)}" if failed else f"all {len(findings)} comparisons passed")


def _nearest(findings: Sequence[Finding]) -> Finding:
    return max(findings, key=lambda finding: finding.comparison.excess)


def _errors(finding: Finding) -> str:
    return f"{finding.comparison.error:.1e} / {finding.comparison.eager_error:.1e}"


def _place(finding: Finding) -> str:
    return f"{finding.case.label} {finding.case.act}"
