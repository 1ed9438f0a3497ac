"""A whole model on photographs: inference, and a training step."""

import pytest
from conftest import cells


@pytest.mark.parametrize("parameters", cells("model", ["fwd", "train"]))
def bench_model(run_cell, parameters):
    run_cell(parameters)
