import sys

import pytest
import torch

from mambaout_kernels.backends import cpu

ISAS = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set that the compiled kernels and this processor have, in turn."""
    before = cpu.module.cpu_capability()
    cpu.module.set_cpu_capability(request.param)
    yield request.param
    cpu.module.set_cpu_capability(before)


def pytest_terminal_summary(terminalreporter):
    host = sys.modules.get("cuda_host.host")
    if host is not None and host.CALLS:
        calls = ", ".join(f"{host.CALLS[check]} {check}" for check in host.CHECKS)
        terminalreporter.write_line(f"CUDA kernels called on the CPU, by check: {calls}")
