import os
import sys
from pathlib import Path

# Before torch: where tests ask for more threads than there are cores, threads that wait busily take all of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Nor torch: the process that starts those of the tests does without it, and they begin four seconds earlier.
import pytest
from hypothesis import settings
from processes import python

# How many cases generated tests run, of 100: --hypothesis-profile=nightly. A case that fails is found again by the blob
# that is printed.
settings.register_profile("usual", max_examples=100, deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("usual")

# What builds, compiles, starts processes or other runtimes, times, or generates cases: files and tests that are not in
# make test-fast.
SLOW = (
    "test_beyond_int32", "test_build", "test_compilers", "test_complaints", "test_concurrency", "test_cpu_launch",
    "test_cuda_binding", "test_cuda_build", "test_cuda_depthwise", "test_cuda_depthwise_binding",
    "test_cuda_depthwise_build", "test_cuda_host", "test_distributed", "test_docs", "test_examples",
    "test_fallback_install", "test_fuzz", "test_generated", "test_gpu_acceptance", "test_latency", "test_namespace",
    "test_peers", "test_adapters", "test_processes", "test_scan_launch", "test_scan_report",
    "test_timm", "test_soak", "test_triton_variants", "test_wheel",
    "test_a_run_of_models_against_each_other",
    "test_aotinductor", "test_bench_block_measures_memory", "test_bench_model_on_photographs",
    "test_bench_writes_what_it_measured", "test_environment_variable", "test_a_process_and_its_pipe",
    "test_interrupt_of_a_process", "test_interrupt_while_torch_is_imported", "test_kernelized_block_compiles",
    "test_another_process_that_imports_the_package_handles_interrupts_itself", "test_memory_of_an_inference",
    "test_unpickles_in_another_process",
)  # fmt: skip


# Files for one process of the tests: they use what takes long to build or to read, one after the other.
TOGETHER = {
    "test_scan_launch": "test_cpu_launch", "test_cuda_depthwise_build": "test_cuda_build", "test_peers": "test_latency",
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return TOGETHER.get(Path(file).stem, Path(file).stem)

    return ByFile(config, log)


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="of every test its first case, without the slow files")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--fast"):
        return
    first, chosen, others = set(), [], []
    for item in items:
        function = getattr(item, "originalname", item.name)
        name = (item.path, getattr(item, "cls", None), function)
        wanted = name not in first and not {item.path.stem, function} & {*SLOW}
        first.add(name)
        (chosen if wanted else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


@pytest.fixture(autouse=True)
def _same_start():
    import torch

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forked_workers(monkeypatch):
    """The processes in which the package measures are forks of one that has torch imported."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.fixture
def _scalar_loops():
    """inductor's loops without vectors compile in half the time; what it makes of this package's ops is the same."""
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.simdlen": 1}):
        yield


def pytest_generate_tests(metafunc):
    """The parameters of the fixture isa, where a test does not give its own."""
    lists = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    own = {name for names in lists for name in (names.replace(",", " ").split() if isinstance(names, str) else names)}
    if "isa" in metafunc.fixturenames and "isa" not in own:
        from mambaout_kernels.backends import cpu

        found = [] if cpu.module is None else cpu.module.supported_cpu_capabilities()
        metafunc.parametrize("isa", found, indirect=True)


@pytest.fixture
def isa(request):
    """Each instruction set that the compiled kernels and this processor have, in turn."""
    from mambaout_kernels.backends import cpu

    before = cpu.module.cpu_capability()
    cpu.module.set_cpu_capability(request.param)
    yield request.param
    cpu.module.set_cpu_capability(before)


def counts() -> list[str]:
    """What this process called and compared, in words."""
    lines = []
    host = sys.modules.get("cuda_host.host")
    if host is not None and host.CALLS:
        calls = ", ".join(f"{host.CALLS[check]} {check}" for check in host.CHECKS)
        lines.append(f"CUDA kernels called on the CPU, by check: {calls}")
    generated, numerics = sys.modules.get("generated"), sys.modules.get("numerics")
    if generated is not None and generated.RUN:
        lines += [f"{count:6} {test}" for test, count in generated.RUN.items()]
        compared, few = numerics.COMPARED.values()
        lines.append(
            f"{generated.RUN.total()} generated cases ran to their end; {compared} tensors within their bounds, "
            f"{few} of them with too few errors to compare these with eager's"
        )
    return lines


_of_workers: list[str] = []


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["counts"] = counts()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _of_workers.extend(getattr(node, "workeroutput", {}).get("counts", ()))


def pytest_terminal_summary(terminalreporter):
    for line in [*_of_workers, *counts()]:
        terminalreporter.write_line(line)
