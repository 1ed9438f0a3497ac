"""The selective scan: the reference against closed forms, and the compiled kernels against it and fp64."""

import numerics
import pytest
import scans
import torch
import torch.nn.functional as F

from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import accuracy
from mambaout_kernels.comparators import reference, scan_orders
from mambaout_kernels.comparators.selective_scan import selective_scan

OPS = torch.ops.mambaout_kernels
needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled CPU kernels")
# N, G, L, D, S, shared: channels of one vector and less, of several tasks and with a remainder; states one at a time,
# in fours and both; steps of one tile, of several, and of one more or less than a tile has.
CASES = [
    (1, 4, 63, 96, 16, True),
    (2, 2, 96, 70, 20, True),
    (2, 3, 65, 130, 3, False),
    (1, 1, 32, 64, 1, True),
    (1, 2, 33, 5, 4, True),
    (3, 2, 31, 9, 2, False),
    (1, 2, 200, 16, 5, True),
    (2, 1, 1, 200, 7, False),
]


# --- the reference ---


def test_without_decay_it_is_a_running_sum():
    (x, delta, A, B, C, skip, bias), order = scans.make_inputs(2, 1, 11, 3, 4, dtype=torch.float64)
    order[0] = torch.arange(11)
    source = (F.softplus(delta + bias) * x)[..., None] * B[..., None, :]
    y = (source.cumsum(2) * C[..., None, :]).sum(-1) + skip * x
    torch.testing.assert_close(reference.selective_scan(x, delta, torch.zeros_like(A), B, C, skip, bias, order), y)


def test_what_a_token_gives_decays_with_the_steps_after_it():
    (x, delta, A, B, C, skip, bias), order = scans.make_inputs(1, 1, 9, 2, 3, dtype=torch.float64)
    order[0] = torch.arange(9)
    step, y = F.softplus(delta + bias)[0, 0], (skip * x)[0, 0].clone()
    for t in range(9):
        for source in range(t + 1):
            decay = (step[source + 1 : t + 1].sum(0)[:, None] * A[0]).exp()  # (D, S)
            y[t] += ((decay * B[0, 0, source]) @ C[0, 0, t]) * step[source] * x[0, 0, source]
    torch.testing.assert_close(reference.selective_scan(x, delta, A, B, C, skip, bias, order)[0, 0], y)


@pytest.mark.parametrize("shared", [True, False])
def test_the_reference_has_its_own_gradients(shared):
    arguments, order = scans.make_inputs(2, 2, 5, 3, 2, shared, dtype=torch.float64)
    arguments[1][0, 0, 0] = 30.0  # above softplus' threshold
    leaves = [t.requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(lambda *a: reference.selective_scan(*a, order), leaves)
    dy = torch.randn_like(arguments[0])
    expected = scans.results(reference.selective_scan, arguments, order, dy)
    for name, gradient in zip(scans.NAMES[1:], OPS.selective_scan_backward(dy, *arguments, order), strict=True):
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("shared", [True, False])
def test_an_order_is_a_permutation_before_and_after(shared):
    (x, delta, A, B, C, skip, bias), order = scans.make_inputs(2, 3, 20, 6, 4, shared)
    expected = torch.zeros(2, 3, 20, 6)
    for g, row in enumerate(order.long()):
        parts = [t[:, g : g + 1] for t in (delta, B, C)]
        own = [t[:, :, row] for t in (x[:, :1] if shared else x[:, g : g + 1], *parts)]
        forwards = torch.arange(20, dtype=torch.int32)[None]
        y = reference.selective_scan(own[0], own[1], A[g : g + 1], own[2], own[3], skip[g : g + 1], bias[g : g + 1],
                                     forwards)  # fmt: skip
        expected[:, g, row] = y[:, 0]
    expected = expected.sum(1, keepdim=True) if shared else expected
    actual = reference.selective_scan(x, delta, A, B, C, skip, bias, order)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- the compiled kernels ---


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, isa):
    arguments, order = scans.make_inputs(*case, dtype=dtype)
    dy = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = scans.exact(arguments, order, dy)
    eager = scans.results(reference.selective_scan, arguments, order, dy)
    actual = scans.results(selective_scan, arguments, order, dy)
    for name in scans.NAMES:
        bound = scans.y_bound(arguments, order, exact["y"], dtype) if name == "y" else None
        assert actual[name].is_contiguous()
        found = accuracy.compare(name, actual[name], eager[name], exact[name], bound)
        few = exact[name].numel() < accuracy.FEW  # too few errors for their mean to mean anything: 20 roundings
        roundings = 20 * torch.finfo(actual[name].dtype).eps * exact[name].abs().max()
        assert found.passed or (few and (actual[name] - exact[name]).abs().max() <= roundings), str(found)


@needs_cpu
def test_the_bound_can_fail():
    arguments, order = scans.make_inputs(1, 4, 63, 96, 16)
    y = reference.selective_scan(*(t.double() for t in arguments), order)
    bound = scans.y_bound(arguments, order, y, torch.float32)
    x, delta, A, *others = arguments
    off = selective_scan(x, delta, A * (1 + 1e-4), *others, order)
    assert ((off - y).abs() > bound).any()
    assert bound.max() < 1e-3 * y.abs().max()


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype):
    arguments, order = scans.make_inputs(3, 4, 70, 150, 16, dtype=dtype)
    dy = torch.randn(arguments[0].shape).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(scans.results(selective_scan, arguments, order, dy))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in scans.NAMES)
    x, delta, A, B, C, *parameters = arguments
    alone = selective_scan(x[1:2], delta[1:2], A, B[1:2], C[1:2], *parameters, order)
    assert torch.equal(alone, found[0]["y"][1:2])


@needs_cpu
def test_any_strides_and_inputs_stay_as_they_are():
    arguments, order = scans.make_inputs(2, 3, 40, 24, 6, shared=False)
    dy = torch.randn(2, 3, 40, 24)
    expected = scans.results(selective_scan, arguments, order, dy)
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in arguments]
    wide = [F.pad(t, (3, 5))[..., 3:-5] for t in turned]
    copies = [t.clone() for t in wide]
    for strided in (turned, wide):
        actual = scans.results(
            selective_scan, strided, order.t().contiguous().t(), dy.transpose(0, 2).contiguous().transpose(0, 2)
        )
        assert all(torch.equal(actual[name], expected[name]) for name in scans.NAMES)
    assert all(torch.equal(t, copy) for t, copy in zip(wide, copies, strict=True))


@needs_cpu
def test_one_projection_may_serve_all_scans():
    (x, delta, A, B, C, *parameters), order = scans.make_inputs(2, 3, 40, 24, 6)
    shared = [t[:, :1].expand_as(t) for t in (delta, B, C)]
    dense = [t.contiguous() for t in shared]
    dy = torch.randn_like(x)
    actual = scans.results(selective_scan, [x, shared[0], A, *shared[1:], *parameters], order, dy)
    expected = scans.results(selective_scan, [x, dense[0], A, *dense[1:], *parameters], order, dy)
    assert all(torch.equal(actual[name], expected[name]) for name in scans.NAMES)


@needs_cpu
def test_extremes():
    """Steps above softplus' threshold, decays that are 0 in float32, growth, and what is not a number."""
    arguments, order = scans.make_inputs(1, 1, 40, 16, 4)
    x, delta, A, *_ = arguments
    delta[..., :4] = 50.0
    delta[..., 4:8] = -60.0
    A[..., 0] = -1e6
    y = selective_scan(*arguments, order)
    exact = reference.selective_scan(*(t.double() for t in arguments), order)
    assert y.isfinite().all()
    assert ((y - exact).abs() <= scans.y_bound(arguments, order, exact, torch.float32)).all()
    x[0, 0, order[0, 20], 3] = float("nan")
    y = selective_scan(*arguments, order)
    touched = y[0, 0].isnan().nonzero()
    assert set(touched[:, 1].tolist()) == {3}
    assert set(touched[:, 0].tolist()) == set(order[0, 20:].tolist())
    delta[0, 0, order[0, 7], 9] = float("nan")
    assert selective_scan(*arguments, order)[0, 0, order[0, 39].item(), 9].isnan()


@pytest.mark.parametrize("backend", ["reference", None])
def test_nothing_in_a_batch(backend):
    arguments, order = scans.make_inputs(0, 2, 5, 3, 2)
    with backends.force(backend):
        found = scans.results(selective_scan, arguments, order, torch.zeros(0, 1, 5, 3))
    assert found["y"].shape == (0, 1, 5, 3)
    assert all((found[name] == 0).all() for name in ("dA", "dskip", "ddelta_bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_an_op(dtype):
    arguments, order = scans.make_inputs(1, 2, 6, 4, 3, dtype=dtype)
    torch.library.opcheck(OPS.selective_scan.default, (*(t.requires_grad_() for t in arguments), order))


def test_compiled_whole():
    arguments, order = scans.make_inputs(1, 2, 20, 8, 4)
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(arguments[0])
    actual, expected = (scans.results(f, arguments, order, dy) for f in (compiled, selective_scan))
    assert all(torch.equal(actual[name], expected[name]) for name in scans.NAMES)


def test_float64_runs_on_the_reference():
    arguments, order = scans.make_inputs(1, 2, 6, 4, 3, dtype=torch.float64)
    assert torch.equal(selective_scan(*arguments, order), reference.selective_scan(*arguments, order))


# --- bad input ---

POSITION = {name: i for i, name in enumerate(("x", "delta", "A", "B", "C", "skip", "delta_bias", "order"))}
BAD = [
    ("x", torch.zeros(2, 3, 20, 6), ValueError, r"x must be \(N, 1 or G, L, D\) = \(2, 1 or 2, 20, 6\); got shape"),
    ("x", torch.zeros(2, 1, 20, 6, dtype=torch.int32), TypeError, "x must be float32, bfloat16, float16 or float64"),
    ("delta", torch.zeros(2, 2, 20), ValueError, r"delta must be \(N, G, L, D\).*got shape \(2, 2, 20\)"),
    ("delta", torch.zeros(2, 2, 0, 6), ValueError, r"delta must be .* 1 or more; got shape \(2, 2, 0, 6\)"),
    ("delta", torch.zeros(2, 2, 20, 6).bfloat16(), TypeError, "delta must be torch.float32 beside an x of"),
    ("A", torch.zeros(2, 6), ValueError, r"A must be \(G, D, S\) = \(2, 6, S\), S of 1 to 256; got shape \(2, 6\)"),
    ("A", torch.zeros(2, 6, 257), ValueError, r"A must be .*S of 1 to 256; got shape \(2, 6, 257\)"),
    ("A", torch.zeros(2, 6, 4).double(), TypeError, "A must be torch.float32"),
    ("B", torch.zeros(2, 2, 20, 5), ValueError, r"B must have shape \(2, 2, 20, 4\); got \(2, 2, 20, 5\)"),
    ("C", torch.zeros(2, 1, 20, 4), ValueError, r"C must have shape \(2, 2, 20, 4\); got \(2, 1, 20, 4\)"),
    ("C", torch.zeros(2, 2, 20, 4).half(), TypeError, "C must be torch.float32"),
    ("skip", torch.zeros(6), ValueError, r"skip must have shape \(2, 6\); got \(6,\)"),
    ("delta_bias", torch.zeros(2, 7), ValueError, r"delta_bias must have shape \(2, 6\); got \(2, 7\)"),
    ("order", torch.zeros(2, 20, dtype=torch.int64), TypeError, "order must be torch.int32"),
    ("order", torch.zeros(2, 19, dtype=torch.int32), ValueError, r"order must have shape \(2, 20\); got \(2, 19\)"),
    ("order", torch.zeros(2, 20, dtype=torch.int32), ValueError, "order must visit each of 20 tokens once; scan 0"),
    ("skip", torch.zeros(2, 6, device="meta"), RuntimeError, "skip must be on the device of x"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("name", "value", "error", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
def test_bad_arguments(name, value, error, message, backend):
    arguments, order = scans.make_inputs(2, 2, 20, 6, 4)
    everything = [*arguments, order]
    everything[POSITION[name]] = value
    with backends.force(backend), pytest.raises(error, match=message):
        selective_scan(*everything)


@pytest.mark.parametrize("token", [-1, 20, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("backend", ["reference", None])
def test_tokens_that_are_not_there(token, backend):
    arguments, order = scans.make_inputs(2, 2, 20, 6, 4)
    order[1, 7] = token
    with backends.force(backend), pytest.raises(ValueError, match="20 tokens once; scan 1 of 2 does not"):
        selective_scan(*arguments, order)
    with backends.force(backend), pytest.raises(ValueError, match="20 tokens once; scan 1 of 2 does not"):
        OPS.selective_scan_backward(torch.zeros_like(arguments[0]), *arguments, order)


@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_gradients(backend):
    arguments, order = scans.make_inputs(2, 2, 20, 6, 4)
    with backends.force(backend):
        with pytest.raises(ValueError, match=r"dy must have x's shape, \(2, 1, 20, 6\); got \(2, 2, 20, 6\)"):
            OPS.selective_scan_backward(torch.zeros(2, 2, 20, 6), *arguments, order)
        with pytest.raises(TypeError, match="dy must have x's dtype"):
            OPS.selective_scan_backward(torch.zeros(2, 1, 20, 6).double(), *arguments, order)


def test_orders_of_all_papers_run():
    for make in (scan_orders.bidirectional, scan_orders.cross, scan_orders.continuous):
        order = make(5, 7)
        arguments, _ = scans.make_inputs(1, order.shape[0], 35, 8, 4)
        y, expected = selective_scan(*arguments, order), reference.selective_scan(*arguments, order)
        numerics.assert_alike(y, expected)
