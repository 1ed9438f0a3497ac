"""The soak for a few seconds in `make test`, for ten minutes in `make nightly`."""

import os

import pytest
import torch

from soak.soak import Soak


@pytest.mark.parametrize(
    ("seconds", "small"), [(5, True), pytest.param(600, False, marks=pytest.mark.nightly)], ids=["short", "long"]
)
def test_nothing_goes_wrong_for_long(seconds, small):
    seed = 0 if small else int.from_bytes(os.urandom(4))
    soak, was = Soak(seed, small), torch.get_num_threads()
    print(f"seed {seed}")
    soak.run(seconds)
    print("; ".join(f"{count} {event}" for event, count in sorted(soak.counts.items())))
    assert soak.counts["outputs compared"] > 0
    assert torch.get_num_threads() == was
