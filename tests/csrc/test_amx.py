"""AMX where the processor has it: beside others' tiles on the same threads, after fork, and where it is not granted.

Its arithmetic is tested on every processor, by test_cpu_launch.py.
"""

import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.module is None or "amx_bf16" not in cpu.module.supported_cpu_capabilities(), reason="no AMX, or not granted"
)
DTYPES = [torch.float32, torch.bfloat16]


def optimized(dtype):
    torch.manual_seed(0)
    model = mk.create_model("test_mambaout", num_classes=7).eval().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    return mk.optimize_for_inference(model), x


def product():
    """Of oneDNN, which has tiles of other shapes."""
    a, b = (torch.randn(n, 67, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (33, 50))
    return F.linear(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_the_tiles_of_others(dtype):
    model, x = optimized(dtype)
    ours, theirs = model(x), product()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(model(x), ours)
            assert torch.equal(product(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_several_threads(dtype):
    model, x = optimized(dtype)
    ours, theirs = model(x), product()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda i: model(x) if i % 2 else product(), range(60)))
    assert all(torch.equal(each, ours if i % 2 else theirs) for i, each in enumerate(found))


def _in_child(queue, model, x):
    queue.put(model(x).float().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_after_fork(dtype):
    torch.set_num_threads(1)
    model, x = optimized(dtype)
    ours = model(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, model, x))
    child.start()
    found = torch.from_numpy(queue.get(timeout=60))
    child.join(60)
    assert torch.equal(found, ours.float())


WITH_A_SMALL_SIGNAL_STACK = """
import ctypes

class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, len(memory))
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
import torch
import mambaout_kernels as mk
from mambaout_kernels import _C
print(_C.cpu_capability(), "amx_bf16" in _C.supported_cpu_capabilities(), _C.cpu_capability_reason(), sep="|")
model = mk.optimize_for_inference(mk.create_model("test_mambaout").eval().bfloat16())
assert model(torch.randn(1, 3, 64, 64).bfloat16()).isfinite().all()
"""


def test_where_the_system_refuses():
    """Linux does not grant tiles to a process with a signal stack that cannot hold them."""
    run = subprocess.run([sys.executable, "-c", WITH_A_SMALL_SIGNAL_STACK], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    capability, supported, reason = run.stdout.strip().split("|")
    if supported == "True":
        pytest.skip("this system granted it")
    assert capability == "avx512"
    assert reason == "the system does not let this process use AMX"
