"""Memory in huge pages: for several tensors side by side, and given back with the last of them."""

import gc
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mambaout_kernels import create_model, huge_pages
from mambaout_kernels.backends import cpu

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="huge pages are asked for on Linux")

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _none_left():
    """No slab of another test."""
    gc.collect()
    huge_pages._last = None
    yield
    gc.collect()


def mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in ranges)


def test_tensors_lie_side_by_side_on_lines_of_their_own():
    sizes = (MIB + 1, 3 * MIB, 200_000, MIB)
    taken = [huge_pages.empty(size) for size in sizes]
    assert len({id(slab) for _, slab in taken}) == 1
    for i, (tensor, _) in enumerate(taken):
        assert tensor.dtype == torch.uint8
        assert tensor.numel() == sizes[i]
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(i)
    assert taken[0][0].data_ptr() % (2 * MIB) == 0
    assert all(bool((tensor == i).all()) for i, (tensor, _) in enumerate(taken))


@pytest.mark.parametrize("size", [0, 1, 127 << 10])
def test_little_is_not_worth_it(size):
    tensor, slab = huge_pages.empty(size)
    assert slab is None
    assert tensor.numel() == size


def test_what_does_not_fit_gets_memory_of_its_own():
    first, slab = huge_pages.empty(20 * MIB)
    large, second = huge_pages.empty(70 * MIB)
    assert slab is not second
    large.fill_(1)
    first.fill_(2)
    assert int(large[-1]) == 1


def test_memory_is_given_back_with_its_last_tensor():
    first, slab = huge_pages.empty(MIB)
    second, again = huge_pages.empty(MIB)
    address = second.fill_(1).data_ptr()
    assert slab is again
    del first, slab, again
    assert mapped(address)
    assert int(second[0]) == 1
    del second
    gc.collect()
    assert not mapped(address)


def test_without_huge_pages_it_is_plain_memory(monkeypatch):
    def refuse(*_):
        raise OSError("no such advice")

    monkeypatch.setattr(huge_pages, "Slab", refuse)
    tensor, slab = huge_pages.empty(MIB)
    assert slab is None
    assert tensor.numel() == MIB


def test_inference_mode_makes_no_difference():
    with torch.inference_mode():
        first, slab = huge_pages.empty(MIB)
    second, _ = huge_pages.empty(MIB)
    assert not first.is_inference()
    second.fill_(1)
    assert slab is not None


def test_threads_get_different_memory():
    found = []

    def take():
        for _ in range(20):
            found.append(huge_pages.empty(300_000))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begins = sorted(tensor.data_ptr() for tensor, _ in found)
    assert all(b - a >= 300_000 for a, b in pairwise(begins))


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_a_models_packed_parameters_go_with_it():
    model = create_model("mambaout_femto").eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert huge_pages._last is not None
    slab = huge_pages._last()
    assert slab is not None
    address = slab._bytes.data_ptr()
    del slab, model
    gc.collect()
    assert huge_pages._last() is None
    assert not mapped(address)
