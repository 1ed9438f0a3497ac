"""A thousand calls of the fuzzer (fuzzer.py); `make sanitize` makes 200,000, under AddressSanitizer and UBSan."""

import pytest

from fuzz import calls, fuzzer, mutations
from mambaout_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.mark.usefixtures("forked_workers")
def test_no_call_does_harm():
    run = fuzzer.Run(fuzzer.arguments(["--calls", "1200"]))
    print(run.table())
    assert not run.failures, "\n".join(run.failures)
    assert {name for name, found in run.counts.items() if found["returned"]} >= set(calls.KNOWN) - set(calls.REFUSED)


def test_every_op_has_valid_calls_and_every_argument_a_generator():
    """Of a new op, valid calls make the fuzzer reach what lies behind its first checks."""
    ops = calls.cpu_ops()
    assert set(ops) == set(calls.KNOWN)
    for op in ops.values():
        assert all(mutations.generator(op, argument) for argument in op._schema.arguments)
