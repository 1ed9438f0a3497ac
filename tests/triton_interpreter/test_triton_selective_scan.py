"""The selective scan in Triton, in the interpreter: y and every gradient, beside the reference and against fp64."""

import pytest
import torch
from numerics import assert_accurate

from mambaout_kernels import backends
from mambaout_kernels.comparators import reference, selective_scan
from mambaout_kernels.comparators.triton_kernels import launch

NAMES = ("y", "x", "delta", "A", "B", "C", "skip", "delta_bias")
PARAMETERS = ("A", "skip", "delta_bias")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True, scope="module")
def _functions_called_as_they_are():
    """The interpreter looks through all of Triton's language at every call of a function within a kernel, for what it
    has long replaced: half of the time of these kernels. Once for each module is enough."""
    from triton.runtime import interpreter

    by_default, replaced = interpreter.InterpretedFunction.__call__, set()

    def call(self, *args, **named):
        names = self.fn.__globals__
        if names.get("tl") is interpreter.tl or id(names) in replaced:
            return self.rewrite()(*args, **named)
        replaced.add(id(names))
        return by_default(self, *args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    """So that few steps are several segments and chunks."""
    monkeypatch.setattr(launch, "SEGMENT", 8)


@pytest.fixture
def one_chunk(monkeypatch):
    monkeypatch.setattr(launch, "PROGRAMS", 1)


def given(N=1, G=2, L=17, D=10, S=3, shared=True, dtype=torch.float32, seed=0):
    """The arguments, and dy. Decays over a step from none to all but complete; sums of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    order = torch.stack([torch.randperm(L, generator=generator) for _ in range(G)]).int()
    x, dy = normal(2, N, 1 if shared else G, L, D).to(dtype)
    rows = [normal(N, G, L, size).to(dtype) for size in (D, S, S)]
    A = -torch.rand((G, D, S), generator=generator) * S
    return [x, rows[0], A, *rows[1:], normal(G, D), normal(G, D) - 1, order], dy


def run(function, arguments, dy):
    """y and the gradients, by name."""
    *tensors, order = arguments
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, order)
    return dict(zip(NAMES, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def ours(arguments, dy):
    with backends.force("triton"):
        return run(selective_scan.selective_scan, arguments, dy)


def assert_sums_accurate(actual, eager, exact, steps):
    """A few sums over steps, added one after another and not in pairs as by PyTorch: beyond twice its error, as many
    roundings of the largest as so many steps gather by chance, sqrt(steps)."""
    assert (actual.dtype, actual.shape) == (eager.dtype, eager.shape)
    errors = [(t.double() - exact).abs().max() for t in (actual, eager)]
    assert errors[0] <= 2 * errors[1] + 2**-24 * steps**0.5 * exact.abs().max()


def exact(arguments, dy):
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    return run(reference.selective_scan, wide, dy.double())


CASES = [
    # S, shared x, several chunks, dtype
    (1, True, True, "fp32"), (1, False, False, "bf16"), (3, True, False, "fp16"), (3, False, True, "fp32"),
    (16, True, True, "bf16"), (16, False, False, "fp32"), (20, True, False, "fp32"), (20, False, True, "fp16"),
]  # fmt: skip


@pytest.mark.parametrize(("S", "shared", "several", "dtype"), CASES)
def test_against_fp64(S, shared, several, dtype, request):
    """No further off than twice the reference in the same dtype, and what numerics.py allows for a rounding: states
    and sums are in float32 in both, in another order, and log2(e) in A is one rounding more of each decay."""
    if not several:
        request.getfixturevalue("one_chunk")
    arguments, dy = given(S=S, shared=shared, dtype=DTYPES[dtype], D=40 if S == 1 else 10)
    found, eager, truth = ours(arguments, dy), run(reference.selective_scan, arguments, dy), exact(arguments, dy)
    for name in NAMES:
        assert found[name].is_contiguous()
        if name in PARAMETERS:
            assert_sums_accurate(found[name], eager[name], truth[name], steps=17)
        else:
            assert_accurate(found[name], eager[name], truth[name])


def test_any_strides_and_the_same_bits_at_each_run():
    arguments, dy = given(N=2, L=5)
    x, delta, A, B, C, skip, bias, order = arguments
    strided = [
        x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        delta.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
        A.permute(2, 0, 1).contiguous().permute(1, 2, 0), B.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
        C.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), skip.t().contiguous().t(), bias.t().contiguous().t(),
        order.t().contiguous().t(),
    ]  # fmt: skip
    by_rows = dy.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert not any(t.is_contiguous() for t in strided)
    first, second = ours(arguments, dy), ours(strided, by_rows)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_one_delta_for_all_scans():
    arguments, dy = given(L=6)
    arguments[1] = arguments[1][:, :1].expand(-1, 2, -1, -1)
    found, expected = ours(arguments, dy), run(reference.selective_scan, arguments, dy)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_that_are_not_there_are_left_out(shared):
    """A scan goes on without that step, and the tokens that it does not visit have nothing from it."""
    arguments, dy = given(shared=shared)
    order = arguments[-1]
    valid = torch.ones(17, dtype=torch.bool)
    valid[[3, 11]] = False
    left_out = order[1, ~valid].long()
    order[1, 3], order[1, 11] = 17, -(2**31)
    found = ours(arguments, dy)

    def without(*tensors):
        x, delta, A, B, C, skip, bias, order = tensors
        visited, in_turn = order[1, valid].long(), torch.arange(15, dtype=torch.int32)[None]
        x1, delta1, B1, C1 = (t[:, -1:, visited] for t in (x, delta, B, C))
        own = reference.selective_scan(x1, delta1, A[1:], B1, C1, skip[1:], bias[1:], in_turn)
        second = torch.zeros_like(x[:, -1:]).index_copy(2, visited, own)
        x0, delta0, B0, C0 = (t[:, :1] for t in (x, delta, B, C))
        first = reference.selective_scan(x0, delta0, A[:1], B0, C0, skip[:1], bias[:1], order[:1])
        return first + second if shared else torch.cat((first, second), 1)

    expected = run(without, arguments, dy)
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    assert not found["delta"][:, 1, left_out].any()
    if not shared:
        assert not found["y"][:, 1, left_out].any()


def test_softplus_as_pytorch_has_it():
    """From its linear part to where 1 + exp(x) is 1 in float32; y is delta here, and its gradient the slope."""
    raw = torch.tensor([80.0, 20.5, 19.5, 5.0, 0.3, 0.0, -0.3, -5.0, -18.0, -60.0])
    arguments, _ = given(G=1, L=1, S=1)
    for t, value in zip(arguments[:-1], (1.0, raw, -1.0, 1.0, 1.0, 0.0, 0.0), strict=True):
        t.copy_(torch.as_tensor(value))
    found, truth = (f(arguments, torch.ones(1, 1, 1, 10)) for f in (ours, exact))
    for name in ("y", "delta", "delta_bias"):  # four roundings of float32
        torch.testing.assert_close(found[name].double(), truth[name], rtol=2.0**-22, atol=0.0)


def test_without_images():
    arguments, dy = given(N=0)
    found = ours(arguments, dy)
    assert found["y"].shape == (0, 1, 17, 10)
    assert not any(found[name].any() for name in NAMES)


def test_fp64_is_the_references():
    arguments, _ = given(L=3)
    wide = [t.double() if t.is_floating_point() else t for t in arguments]
    with backends.force("triton"):
        assert torch.equal(selective_scan.selective_scan(*wide), reference.selective_scan(*wide))


def test_chunks_are_several_where_programs_are_few(monkeypatch):
    monkeypatch.setattr(launch, "SEGMENT", 32)
    assert launch.chunks_of(1536, 3136) == (1, 3136)
    assert launch.chunks_of(683, 3136) == (1, 3136)
    for programs, L in ((1, 1), (12, 3136), (600, 3136), (1, 10**6), (40, 196), (1, 33)):
        chunks, length = launch.chunks_of(programs, L)
        assert length % 32 == 0
        assert (chunks - 1) * length < L <= chunks * length
        assert chunks <= launch.MOST_CHUNKS
    assert launch.chunks_of(12, 3136)[0] > 20


def test_opcheck():
    arguments, dy = given(G=1, L=2, D=4, S=1)
    *tensors, order = arguments
    with backends.force("triton"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(backends.namespace.ops.selective_scan.default, (*leaves, order))
        torch.library.opcheck(backends.namespace.ops.selective_scan_backward.default, (dy, *arguments))
