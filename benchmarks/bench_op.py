"""The fused op alone: forward, and backward after a forward that is not timed."""

import pytest
from conftest import cells


@pytest.mark.parametrize("parameters", cells("op", ["fwd", "bwd"]))
def bench_op(run_cell, parameters):
    run_cell(parameters)
