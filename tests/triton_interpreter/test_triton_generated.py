"""Cases from hypothesis for the Triton kernels; small, for the interpreter takes a second for each."""

import pytest
import torch
from generated import LOW, number_of_cases, op_cases
from hypothesis import assume, given
from numerics import check_backend


@pytest.mark.generated
@number_of_cases(10)
@given(op_cases(dtypes=(torch.float32, *LOW), most_channels=24, kernel_sizes=(1, 3, 5, 7)))
def test_triton(case):
    inputs = case.inputs
    assume(inputs.dy.numel() <= 2000)
    check_backend("triton", inputs, case.act)
