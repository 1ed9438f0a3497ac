"""pytest-benchmark on the package's own harness: the same cells and shapes as `mambaout-kernels bench`.

    pytest benchmarks/bench_op.py --benchmark-group-by=group -k "fp32 and b8"

Before each timed call of one contender the others take a turn that is not timed, so that whatever disturbs the machine,
and what is left in its caches, is the same for all. `--threads` sets the number of threads, 1 by default.
"""

from contextlib import ExitStack

import pytest
import torch

from mambaout_kernels.benchmarking import accuracy, shapes, workloads
from mambaout_kernels.benchmarking.workloads import Cell

CONTENDERS = ("fused", "eager", "naive")
ROUNDS = 10


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=1, help="threads of PyTorch, default 1")
    parser.addoption("--variant", default=shapes.variants()[0], choices=shapes.variants(), help="whose stages")


@pytest.fixture(autouse=True, scope="session")
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.set_num_threads(before)


def cells(subject, modes):
    """Parameters of a benchmark: every stage (a model: the whole), mode, dtype, batch and contender."""
    stages = range(1, 2 if subject == "model" else 5)
    return [
        pytest.param((subject, stage, mode, dtype, batch, name), id=f"{mode}-stage{stage}-{dtype}-b{batch}-{name}")
        for stage in stages
        for mode in modes
        for dtype in ("fp32", "bf16")
        for batch in shapes.BATCHES
        for name in CONTENDERS
    ]


@pytest.fixture
def run_cell(request, benchmark):
    """Times one contender of a cell after fused was found right."""

    def run(parameters):
        subject, stage, mode, dtype, batch, name = parameters
        [shape] = shapes.stages(request.config.getoption("--variant"), [stage])
        source = "photographs" if subject == "model" else "random"
        cell = Cell(subject, mode, dtype, batch, shape, CONTENDERS, source=source)
        if name == "fused":
            checked = accuracy.worst(workloads.verify(cell))
            assert checked.passed, f"fused is wrong: {checked}"
        contenders = {contender.name: contender for contender in workloads.build(cell).contenders}
        timed = contenders.pop(name)

        entered = ExitStack()

        def others_turn():
            entered.close()
            for other in contenders.values():
                with other.context():
                    other.run(other.prepare())
            entered.enter_context(timed.context())
            return (timed.prepare(),), {}

        benchmark.group = f"{subject} {mode} {cell.label} {dtype} batch {batch}"
        benchmark.extra_info |= {"contender": name, "dtype": dtype, "threads": torch.get_num_threads()}
        with entered:
            benchmark.pedantic(timed.run, setup=others_turn, rounds=ROUNDS, warmup_rounds=2)

    return run
