"""How often the Triton kernels are compiled: Triton's own launcher, for a GPU that is not here, up to the compiler."""

import os
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from mambaout_kernels.benchmarking.workloads import DTYPES
from mambaout_kernels.cli import check, special_values
from mambaout_kernels.reference import ACTIVATIONS

if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs Triton's launcher", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mambaout_kernels.audit import triton as audit
from mambaout_kernels.backends.triton_kernels import launch, tiles

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
NAMES = {
    "gated_dwconv_fwd": "forward",
    "gate_backward": "gate_backward",
    "input_gradient": "input_gradient",
    "weight_gradient_partials": "weight_gradient",
}
SMALL = check.Case("", 2, 11, 13, 40, 24, 7, "gelu", "bf16")


class Driver:
    """What the launcher asks of the driver before it compiles."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


@pytest.fixture(params=TARGETS)
def compiled(request, monkeypatch):
    """By kernel and key, what the launcher would have compiled."""
    found = {}

    def instead_of_compiling(key, fn, compile, **_):
        found[fn.name.rpartition(".")[2], key] = compile
        return True

    for name in (*NAMES, "pack_filter", "weight_gradient_sum"):
        kernel = getattr(launch, name)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))  # they remember the target
    monkeypatch.setattr(driver, "_active", Driver(TARGETS[request.param]))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", instead_of_compiling)
    monkeypatch.setattr(launch, "architecture", lambda device: request.param)
    return found


def call(u, weight, bias, dy, act):
    launch.forward(u, weight, bias, act)
    launch.backward(dy, u, weight, bias, act)


def call_case(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator: torch.empty(shape, device="meta"))
        call(*check._inputs(case, "meta"), case.act)


def call_special_values(dtype, act):
    for kind in special_values.KINDS:
        for convolved in (False, True):
            call(*special_values.inputs(kind, "gate", convolved, dtype, "meta"), act)


def test_the_launcher_is_asked(compiled):
    call_case(SMALL)
    assert {name for name, _ in compiled} == {*NAMES, "pack_filter", "weight_gradient_sum"}
    before = len(compiled)
    call_case(replace(SMALL, dtype="fp16"))
    assert len(compiled) == 2 * before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("D", "C"), [(40, 24), (42, 20), (37, 19), (1, 1)], ids=str)
def test_sizes_add_no_variant(compiled, dtype, D, C):
    case = replace(SMALL, D=D, C=C, dtype=dtype)
    call_case(case)
    once = set(compiled)
    for N, H, W in ((1, 1, 1), (1, 16, 16), (16, 1, 5), (16, 5, 1), (3, 7, 48), (256, 56, 56)):
        call_case(replace(case, N=N, H=H, W=W))
    for factor in (3, 5):  # as many channels as VEC allows
        call_case(replace(case, D=factor * D, C=factor * C))
    assert set(compiled) == once


def test_filters_add_none_where_nothing_is_unrolled(compiled):
    for K in (1, 3, 7, 31):
        call_case(replace(SMALL, K=K))
    counts = Counter(name for name, _ in compiled)
    assert counts["pack_filter"] == counts["weight_gradient_sum"] == 1


def test_parameters_anywhere_in_memory(compiled):
    shapes = ((1, 2, 2, 16), (8, 1, 3, 3), (8,), (1, 2, 2, 8))
    u, weight, bias, dy = (torch.empty(shape, device="meta") for shape in shapes)
    call(u, weight, bias, dy, "gelu")
    once = set(compiled)
    flat = torch.empty(81, device="meta")
    assert flat[1:].data_ptr() % 16
    call(u, flat[1:73].view(8, 1, 3, 3), flat[73:], dy, "gelu")
    assert set(compiled) == once


def test_variants_of_a_full_check(compiled):
    """They were 427 when Triton chose what to compile anew for."""
    dtypes = ("fp32", "bf16", "fp16")
    for case in check.find_cases("mambaout_tiny", dtypes, full=True):
        call_case(case)
    for dtype in dtypes:
        for act in ACTIVATIONS:
            call_special_values(DTYPES[dtype], act)
    assert Counter(name for name, _ in compiled) == {
        "gated_dwconv_fwd": 45,
        "gate_backward": 45,
        "input_gradient": 27,
        "weight_gradient_partials": 23,
        "weight_gradient_sum": 6,
        "pack_filter": 3,
    }


@pytest.mark.parametrize("dtype", audit.DTYPES)
@pytest.mark.parametrize(("D", "C"), [(64, 32), (37, 19)], ids=["aligned", "odd"])
def test_the_audit_compiles_what_is_launched(compiled, dtype, D, C):
    target, (element, bits) = launch.architecture(torch.device("cuda")), audit.DTYPES[dtype]
    short = next(name for name, t in DTYPES.items() if str(t) == f"torch.{dtype}")
    call_case(replace(SMALL, D=D, C=C, dtype=short))
    seen = set()
    for (name, _), given in compiled.items():
        if name not in NAMES:
            continue
        tile = tiles.choose(target, NAMES[name], bits, SMALL.W, 7, D == 64)
        configuration = audit.Configuration(NAMES[name], target, dtype, tile, aligned=D == 64)
        function, constants = audit._kernel(configuration)
        types, known = audit._signature(
            function, constants, lambda name: element if name in audit._TYPED else "fp32", target.startswith("gfx")
        )
        assert given["signature"] == types
        assert {k: v for k, v in given["configs"][0].items() if v} == known
        assert {function.arg_names[place]: value for (place,), value in given["constants"].items()} == constants
        seen.add(name)
    assert seen == set(NAMES)
