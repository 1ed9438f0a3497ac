"""The CPU's selective scan through its launch interface (tests/cpu_launch): guard pages, sanitizers, races."""

import pytest
import scans
import torch
from cpu_launch import launch
from cpu_launch.launch import Fault, Where
from numerics import assert_alike

from mambaout_kernels.backends import cpu
from mambaout_kernels.comparators import reference

if launch.missing() or cpu.unavailable():
    pytest.skip(str(launch.missing() or cpu.unavailable()), allow_module_level=True)

# N, G, L, D, S, shared: as test_selective_scan.py's
CASES = [(2, 3, 65, 70, 5, True), (1, 2, 33, 130, 4, False), (2, 1, 1, 3, 1, True), (1, 4, 96, 64, 9, True)]
RUNNING: dict[str, launch.Program] = {}


def program(kind):
    return RUNNING.setdefault(kind, launch.Program(kind)) if kind not in RUNNING else RUNNING[kind]


@pytest.fixture(scope="module", autouse=True)
def _programs_end_well():
    yield
    for running in RUNNING.values():
        running.close()


def apart(t):
    """The same with what is not its own between the rows."""
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), float("nan"))
    wide[..., : t.shape[-2], : t.shape[-1]] = t
    return wide[..., : t.shape[-2], : t.shape[-1]]


@pytest.mark.parametrize("at_begin", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", launch.kinds(on_amx=False))
def test_nothing_beside_the_tensors(kind, case, dtype, at_begin):
    arguments, order = scans.make_inputs(*case, dtype=dtype)
    arguments[:2] = map(apart, arguments[:2])
    dy = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = scans.results(reference.selective_scan, arguments, order, dy).values()
    for isa in launch.isas_of(kind, cpu.module.supported_cpu_capabilities()):
        found = program(kind).scan(arguments, order, dy, Where(isa, 3, at_begin))
        for ours, theirs in zip(found, expected, strict=True):
            assert_alike(ours, theirs, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


def test_a_read_beyond_a_tensor_is_seen():
    arguments, order = scans.make_inputs(1, 1, 33, 40, 4)
    arguments[5] = arguments[5][:, :39]  # skip
    with pytest.raises(Fault):
        launch.Program("plain").scan(arguments, order, torch.randn(1, 1, 33, 40), Where())
