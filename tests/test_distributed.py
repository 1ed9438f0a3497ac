"""DDP and FSDP2 with activation checkpointing under torchrun: two gloo processes train as one does."""

import copy
import json
import os
import subprocess
from pathlib import Path

import distributed_training
import pytest
import torch
from processes import python

from mambaout_kernels.weights.checkpoints import load_into

SCRIPT = Path(distributed_training.__file__)
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


def train(kind, folder):
    """(losses, file of weights)."""
    out = folder / f"{kind}.json"
    launcher = []
    if kind != "single":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    package = str(SCRIPT.parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    command = [python(), *launcher, str(SCRIPT), kind, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()), out.with_suffix(".pth")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train("single", tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind, alone, tmp_path):
    if kind == "fsdp":
        pytest.importorskip("timm")
    losses, file = train(kind, tmp_path)
    expected, expected_file = alone
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < 0.7 * losses[0]
    start = distributed_training.make_model()
    end, expected_end = copy.deepcopy(start), copy.deepcopy(start)
    load_into(end, file)
    load_into(expected_end, expected_file)
    before, after, expected_after = (
        torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (start, end, expected_end)
    )
    # AdamW divides by the size of a gradient, so that rounding shows where a gradient is near 0
    assert (after - expected_after).norm() < 0.05 * (expected_after - before).norm()
