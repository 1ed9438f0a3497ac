"""torch.func and forward-mode AD: the same as PyTorch's own operators give, or refused."""

import copy
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from mambaout_kernels import FusedGatedCNNBlock, backends, create_model, gated_dwconv, optimize_for_inference

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def op():
    torch.manual_seed(0)
    return partial(gated_dwconv, weight=torch.randn(8, 1, 3, 3), bias=torch.randn(8)), torch.randn(1, 4, 4, 32)


def block():
    torch.manual_seed(0)
    return FusedGatedCNNBlock(8, kernel_size=3, ls_init_value=0.5), torch.randn(1, 4, 4, 8)


def model():
    torch.manual_seed(0)
    return create_model("mambaout_femto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), torch.randn(1, 3, 33, 33)


def head():
    network, _ = model()
    return network.head, torch.randn(2, 16)


def on_a_dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.cos(x)))).tangent


TRANSFORMS = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.cos(x),))[1],
    "dual numbers": on_a_dual,
    "jacfwd": lambda f, x: jacfwd(lambda x: f(x).sum(-1))(x),
    "grad": lambda f, x: grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: vmap(f)(torch.stack((x, -x))),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).square().sum()))(torch.stack((x, -x))),
    "jacrev": lambda f, x: jacrev(lambda x: f(x).mean(0))(x),
}


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("make", [op, block, model, head], ids=lambda make: make.__name__)
def test_as_pytorchs_own_operators(make, transform, gradients):
    if transform == "jacfwd" and make is model:
        pytest.skip("3267 calls of a model")
    f, x = make()
    with torch.set_grad_enabled(gradients):
        actual = TRANSFORMS[transform](f, x)
        with backends.force("reference"):
            expected = TRANSFORMS[transform](f, x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual, expected)


def test_second_derivatives_of_forward_over_reverse():
    f, x = op()
    actual = hessian(lambda bias: f(x, bias=bias).square().sum())(torch.randn(8))
    assert actual.shape == (8, 8)
    assert actual.diagonal().min() > 0


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no gradients"])
def test_an_ensemble_of_stacked_weights(gradients):
    torch.manual_seed(0)
    blocks = [FusedGatedCNNBlock(8, kernel_size=3) for _ in range(3)]
    parameters, buffers = stack_module_state(blocks)
    x = torch.randn(1, 4, 4, 8)
    with torch.set_grad_enabled(gradients):
        y = vmap(lambda p, b: functional_call(blocks[0], (p, b), (x,)))(parameters, buffers)
        torch.testing.assert_close(y, torch.stack([each(x) for each in blocks]))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "vmap of grad"])
def test_compiled(transform):
    f, x = op()
    transformed = partial(TRANSFORMS[transform], f)
    compiled = torch.compile(transformed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), transformed(x))


def test_the_kernels_are_back_afterwards():
    f, x = op()
    jvp(f, (x,), (x,))
    assert not backends.uses_reference("cpu") or backends.status()["cpu"] is not None


@pytest.mark.parametrize("transform", ["jvp", "dual numbers", "jacfwd", "grad"])
def test_an_inference_model_refuses_to_be_differentiated(transform):
    network, x = model()
    inference = optimize_for_inference(network)
    for f in (inference, inference.model):
        with pytest.raises(RuntimeError, match="an inference model does not compute"), torch.enable_grad():
            TRANSFORMS[transform](f, x)


def test_an_inference_model_may_be_called_within_a_differentiated_function():
    network, x = model()
    inference = optimize_for_inference(copy.deepcopy(network))
    expected = inference(x)
    _, tangent = jvp(lambda t: t * inference(x).sum(), (torch.ones(()),), (torch.ones(()),))
    torch.testing.assert_close(tangent, expected.sum())
