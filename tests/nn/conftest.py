"""Fixtures of the modules' tests."""

import pytest

from mambaout_kernels.ops import linear


@pytest.fixture
def products_of_pytorch():
    """Products of linear layers that no kernel fuses are PyTorch's, for tests of what is called.

    Ours are other sums on some processors (AMX: of bf16 parts), and then their results are not PyTorch's to the bit.
    Not for tests of weights that only PyTorch multiplies: what knows them is replaced here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_use_native", lambda *tensors: False)
        yield
