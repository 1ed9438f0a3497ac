"""A whole Gated CNN block: inference, and a training step."""

import pytest
from conftest import cells


@pytest.mark.parametrize("parameters", cells("block", ["fwd", "train"]))
def bench_block(run_cell, parameters):
    run_cell(parameters)
