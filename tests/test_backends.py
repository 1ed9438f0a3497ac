"""Which backend runs."""

import os
import subprocess
import sys

import pytest
import torch
from numerics import make_inputs

from mambaout_kernels import backends, gated_dwconv


def test_status_names_every_backend_and_the_reference_always_works():
    status = backends.status()
    assert tuple(status) == backends.NAMES
    assert status["reference"] is None


def test_every_reason_is_a_sentence_for_a_person():
    for name, reason in backends.status().items():
        assert reason is None or len(reason) > 20, name


def test_force_is_undone_after_an_error():
    with pytest.raises(ValueError, match="act must"), backends.force("reference"):
        gated_dwconv(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.zeros(1), "relu")
    assert backends.forced() is None


def test_force_nests():
    with backends.force("reference"):
        with backends.force("reference"):
            pass
        assert backends.forced() == "reference"


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'tpu'"),
        backends.force("tpu"),
    ):
        pass


@pytest.mark.parametrize("name", [n for n, reason in backends.status().items() if reason is not None])
def test_forcing_what_is_not_there_says_why(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used here: "), backends.force(name):
        pass


def test_select_on_the_cpu():
    inputs = make_inputs(1, 2, 2, 4, 2, 3)
    expected = "reference" if backends.load("cpu").unavailable() else "cpu"
    assert backends.select(inputs.u, inputs.weight) is backends.load(expected)
    with backends.force("reference"):
        assert backends.select(inputs.u, inputs.weight) is backends.load("reference")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_environment_variable():
    code = "import mambaout_kernels.backends as b; print(b.forced())"
    assert run(code, MAMBAOUT_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert run(code, MAMBAOUT_KERNELS_BACKEND="").stdout.strip() == "None"
    wrong = run(code, MAMBAOUT_KERNELS_BACKEND="tpu")
    assert wrong.returncode != 0
    assert "MAMBAOUT_KERNELS_BACKEND must be one of reference, cpu, triton, cuda, got 'tpu'" in wrong.stderr


def test_another_device_runs_on_the_reference():
    y = gated_dwconv(
        torch.empty(1, 4, 4, 8, device="meta"), torch.empty(2, 1, 3, 3, device="meta"), torch.empty(2, device="meta")
    )
    assert y.shape == (1, 4, 4, 4)
    assert y.device.type == "meta"
