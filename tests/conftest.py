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
