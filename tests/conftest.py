import os
import sys

# Before torch: where tests ask for more threads than there are cores, threads that wait busily take all of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

from mambaout_kernels.backends import cpu

# How many cases generated tests run, of 100: --hypothesis-profile=nightly. A case that fails is found again by the blob
# that is printed.
settings.register_profile("usual", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("usual")

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
    generated, numerics = sys.modules.get("generated"), sys.modules.get("numerics")
    if generated is not None and generated.RUN:
        for test, count in generated.RUN.items():
            terminalreporter.write_line(f"{count:6} {test}")
        compared, few = numerics.COMPARED.values()
        terminalreporter.write_line(
            f"{generated.RUN.total()} generated cases ran to their end; {compared} tensors within their bounds, "
            f"{few} of them with too few errors to compare these with eager's"
        )
