"""Copies of the package in one process, under other names: each has ops of its own, and computes."""

import shutil
import subprocess
from pathlib import Path

from processes import python

import mambaout_kernels as mk

USE = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import mambaout_kernels, vendor.copy_of_it, another
from mambaout_kernels.backends import cpu

before = cpu.module and cpu.instruction_set()
model = mambaout_kernels.create_model("test_mambaout").eval()
x = torch.randn(1, 3, 64, 64)
for package, namespace in ((vendor.copy_of_it, "vendor_copy_of_it"), (another, "another")):
    own = package.create_model("test_mambaout").eval()
    own.load_state_dict(model.state_dict())
    assert torch.equal(own(x), model(x))
    assert torch.equal(
        package.optimize_for_inference(own)(x), mambaout_kernels.optimize_for_inference(model)(x)
    )
    assert sys.modules[package.__name__ + ".ops.gated_dwconv"]._op.namespace == namespace
    own_cpu = sys.modules[package.__name__ + ".backends.cpu"]
    assert (own_cpu.module is None) == (cpu.module is None)
    if cpu.module is not None:
        assert own_cpu._forward.namespace == namespace
        own_cpu.module.set_cpu_capability("portable")
        assert cpu.instruction_set() == before
    print(namespace)
"""


def test_copies_do_not_meet(tmp_path):
    for name in ("vendor/copy_of_it", "another"):
        shutil.copytree(Path(mk.__file__).parent, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([python(), "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["vendor_copy_of_it", "another"]
