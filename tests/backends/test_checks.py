"""What a kernel reads beside x is refused where it cannot be read so."""

import pytest
import torch

from mambaout_kernels.backends.checks import check_beside

SHAPE = (4, 6)


def x():
    return torch.zeros(2, 4)


def test_what_fits_is_taken():
    check_beside(x(), "weight", torch.zeros(SHAPE), SHAPE, torch.float32)
    check_beside(x().bfloat16(), "taps", torch.zeros(SHAPE), SHAPE, torch.float32)


@pytest.mark.parametrize(
    ("t", "error", "said"),
    [
        (torch.zeros(4, 5), ValueError, r"weight must have shape \(4, 6\); got \(4, 5\)"),
        (torch.zeros(24), ValueError, r"weight must have shape \(4, 6\); got \(24,\)"),
        (
            torch.zeros(SHAPE).half(),
            TypeError,
            r"weight must be torch\.float32 beside x of torch\.float32; got torch\.f",
        ),
        (torch.zeros(6, 4).t(), ValueError, r"weight must be contiguous; got strides \(1, 4\) of shape \(4, 6\)"),
        (
            torch.zeros(SHAPE).to_sparse(),
            ValueError,
            r"weight must be dense, of layout torch.strided; got torch.sparse",
        ),
        (torch.zeros(SHAPE).to_mkldnn(), ValueError, r"weight must be dense, .*; got torch._mkldnn"),
        (torch.zeros(SHAPE, device="meta"), ValueError, r"weight must be on the device of x, cpu; got meta"),
    ],
    ids=["a side", "dimensions", "dtype", "transposed", "sparse", "of oneDNN", "device"],
)
def test_what_does_not_is_refused(t, error, said):
    with pytest.raises(error, match=said):
        check_beside(x(), "weight", t, SHAPE, torch.float32)
