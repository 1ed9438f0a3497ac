import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    host = sys.modules.get("cuda_host.host")
    if host is not None and host.CALLS:
        calls = ", ".join(f"{host.CALLS[check]} {check}" for check in host.CHECKS)
        terminalreporter.write_line(f"CUDA kernels called on the CPU, by check: {calls}")
