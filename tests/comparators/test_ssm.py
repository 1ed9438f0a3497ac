"""Token mixers against loops over tokens that flip, transpose and cut maps, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_alike
from torch.utils._python_dispatch import TorchDispatchMode

from mambaout_kernels.comparators import ssm

DIM = 8
MIXERS = {
    "SS2D": ssm.SS2D,
    "LocalScan": lambda dim, **kwargs: ssm.LocalScan(dim, ("h", "v_flip", "w2", "w3_flip"), **kwargs),
    "AtrousScan": ssm.AtrousScan,
    "Bidirectional": ssm.Bidirectional,
    "ContinuousScan": ssm.ContinuousScan,
}
SIZES = [(1, 1), (4, 4), (2, 6), (3, 5), (5, 4)]


def make(name, dtype=torch.float64, **kwargs):
    """A mixer with parameters large enough that each matters."""
    torch.manual_seed(0)
    mixer = MIXERS[name](DIM, states=3, **kwargs).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


def image(size, dtype=torch.float64):
    return torch.randn(2, *size, DIM, dtype=dtype, generator=torch.Generator().manual_seed(1))


def recurrence(mixer, scan, x, theta=0.0):
    """One scan of a sequence x (N, L, D), token after token, by the parameters of scan number `scan`."""
    D, S, R = x.shape[2], mixer.states, mixer.rank
    weight = mixer.x_proj_weight[scan]
    A = -torch.exp(mixer.A_logs[scan * D : (scan + 1) * D])
    h = torch.zeros(x.shape[0], D, S, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        token = x[:, t]
        delta, B, C = token @ weight[:R].t(), token @ weight[R : R + S].t(), token @ weight[R + S :].t()
        B = B + (theta[t] if torch.is_tensor(theta) else theta)
        step = F.softplus(delta @ mixer.dt_projs_weight[scan].t() + mixer.dt_projs_bias[scan])
        h = torch.exp(step[:, :, None] * A) * h + step[:, :, None] * token[:, :, None] * B[:, None]
        outputs.append((h * C[:, None]).sum(-1) + mixer.Ds[scan * D : (scan + 1) * D] * token)
    return torch.stack(outputs, dim=1)


def halves(mixer, x):
    """x and z of the inner width."""
    D = mixer.in_proj.out_features // 2
    return x @ mixer.in_proj.weight[:D].t(), x @ mixer.in_proj.weight[D:].t()


def silu(x):
    return x * torch.sigmoid(x)


def convolved(mixer, x):
    """The depthwise convolution, tap by tap, and SiLU."""
    K = mixer.conv2d.kernel_size[0]
    H, W = x.shape[1:3]
    padded = F.pad(x, (0, 0, K // 2, K // 2, K // 2, K // 2))
    taps = mixer.conv2d.weight[:, 0]
    y = sum(padded[:, i : i + H, j : j + W] * taps[:, i, j] for i in range(K) for j in range(K))
    return silu(y + mixer.conv2d.bias)


def normed(norm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def ss2d(mixer, x):
    x, z = halves(mixer, x)
    x = convolved(mixer, x)
    N, H, W, D = x.shape
    rows, columns = x.reshape(N, H * W, D), x.transpose(1, 2).reshape(N, H * W, D)
    y = recurrence(mixer, 0, rows).view(N, H, W, D)
    y = y + recurrence(mixer, 1, columns).view(N, W, H, D).transpose(1, 2)
    y = y + recurrence(mixer, 2, rows.flip(1)).flip(1).view(N, H, W, D)
    y = y + recurrence(mixer, 3, columns.flip(1)).flip(1).view(N, W, H, D).transpose(1, 2)
    return (normed(mixer.out_norm, y) * silu(z)) @ mixer.out_proj.weight.t()


def windowed(height, width, window):
    """Pixels (h, w), window after window."""
    return [
        (h, w)
        for top in range(0, height, window)
        for left in range(0, width, window)
        for h in range(top, min(top + window, height))
        for w in range(left, min(left + window, width))
    ]


def local_scan(mixer, x):
    x, z = halves(mixer, x)
    x = convolved(mixer, x)
    H, W = x.shape[1:3]
    by_rows = [(h, w) for h in range(H) for w in range(W)]
    by_columns = [(h, w) for w in range(W) for h in range(H)]
    total = torch.zeros_like(x)
    gate = mixer.multi_scan["attn"]
    for scan, path in enumerate((by_rows, by_columns[::-1], windowed(H, W, 2), windowed(H, W, 3)[::-1])):
        y = recurrence(mixer, scan, torch.stack([x[:, h, w] for h, w in path], dim=1))
        placed = {pixel: y[:, t] for t, pixel in enumerate(path)}
        y = torch.stack([torch.stack([placed[h, w] for w in range(W)], dim=1) for h in range(H)], dim=1)
        hidden = F.gelu(gate.global_reduce(normed(gate.norm, y).mean((1, 2))))
        total = total + y * torch.sigmoid(gate.channel_select(hidden))[:, None, None]
    return (normed(mixer.out_norm, total) * silu(z)) @ mixer.out_proj.weight.t()


def atrous_scan(mixer, x):
    x, z = halves(mixer, x)
    x = convolved(mixer, x)
    N, H, W, D = x.shape
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    h, w = x.shape[1] // 2, x.shape[2] // 2
    y = torch.zeros_like(x)
    y[:, ::2, ::2] = recurrence(mixer, 0, x[:, ::2, ::2].reshape(N, -1, D)).view(N, h, w, D)
    columns = recurrence(mixer, 1, x[:, 1::2, ::2].transpose(1, 2).reshape(N, -1, D))
    y[:, 1::2, ::2] = columns.view(N, w, h, D).transpose(1, 2)
    y[:, ::2, 1::2] = recurrence(mixer, 2, x[:, ::2, 1::2].reshape(N, -1, D)).view(N, h, w, D)
    columns = recurrence(mixer, 3, x[:, 1::2, 1::2].transpose(1, 2).reshape(N, -1, D))
    y[:, 1::2, 1::2] = columns.view(N, w, h, D).transpose(1, 2)
    return (normed(mixer.out_norm, y[:, :H, :W]) * silu(z)) @ mixer.out_proj.weight.t()


def causal(conv, x):
    """silu of a causal depthwise convolution of x (N, L, D), token after token."""
    taps = conv.weight[:, 0]  # (D, K), the last of the token itself
    K = taps.shape[1]
    padded = F.pad(x, (0, 0, K - 1, 0))
    return silu(torch.stack([(padded[:, t : t + K] * taps.t()).sum(1) + conv.bias for t in range(x.shape[1])], dim=1))


def bidirectional(mixer, x):
    size = x.shape[1:3]
    x, z = halves(mixer, x.flatten(1, 2))
    ahead = recurrence(mixer, 0, causal(mixer.conv1d, x)) * silu(z)
    back = recurrence(mixer, 1, causal(mixer.conv1d_b, x.flip(1))) * silu(z.flip(1))
    return ((ahead + back.flip(1)) @ mixer.out_proj.weight.t()).unflatten(1, size)


def snake(height, width, by_rows):
    """Pixels in PlainMamba's order, and the direction by which each is reached: start, right, left, up, down."""
    pixels, directions = [], []
    for line in range(height if by_rows else width):
        along = range(width if by_rows else height)
        for place, k in enumerate(along if line % 2 == 0 else reversed(along)):
            pixels.append((line, k) if by_rows else (k, line))
            if place == 0:
                directions.append(0 if line == 0 else 4 if by_rows else 1)
            elif by_rows:
                directions.append(1 if line % 2 == 0 else 2)
            else:
                directions.append(4 if line % 2 == 0 else 3)
    return pixels, directions


def reversed_path(pixels, directions):
    opposite = {1: 2, 2: 1, 3: 4, 4: 3}
    return pixels[::-1], [0] + [opposite[d] for d in directions[:0:-1]]


def continuous_scan(mixer, x):
    x, z = halves(mixer, x)
    x = convolved(mixer, x)
    H, W = x.shape[1:3]
    y = torch.zeros_like(x)
    for by_rows in (True, False):
        path = snake(H, W, by_rows)
        for pixels, directions in (path, reversed_path(*path)):
            scanned = recurrence(
                mixer, 0, torch.stack([x[:, h, w] for h, w in pixels], dim=1), mixer.direction_Bs[directions]
            )
            for t, (h, w) in enumerate(pixels):
                y[:, h, w] += scanned[:, t]
    return (y * silu(z)) @ mixer.out_proj.weight.t()


SLOW = {
    "SS2D": ss2d,
    "LocalScan": local_scan,
    "AtrousScan": atrous_scan,
    "Bidirectional": bidirectional,
    "ContinuousScan": continuous_scan,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MIXERS)
def test_output_and_gradients_are_the_loop_s(name, size):
    mixer, x = make(name), image(size).requires_grad_()
    leaves = {"x": x, **dict(mixer.named_parameters())}
    actual, expected = mixer(x), SLOW[name](mixer, x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    dy = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, list(leaves.values()), dy)
    for leaf, g, e in zip(leaves, gradients, torch.autograd.grad(expected, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


@pytest.mark.parametrize("name", MIXERS)
def test_the_loop_tells_scans_apart(name):
    """With the parameters of two scans exchanged, or none of the directions, the loop gives something else."""
    mixer, x = make(name), image((4, 5))
    before = SLOW[name](mixer, x)
    with torch.no_grad():
        if name == "ContinuousScan":
            mixer.direction_Bs.copy_(mixer.direction_Bs[[0, 2, 1, 3, 4]])
        else:
            order = [1, 0, *range(2, mixer.scans)]
            mixer.x_proj_weight.copy_(mixer.x_proj_weight[order])
    assert (SLOW[name](mixer, x) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", MIXERS)
def test_shapes_and_gradients_in_float32(name):
    mixer, x = make(name, torch.float32), image((5, 6), torch.float32).requires_grad_()
    y = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    y.square().sum().backward()
    for parameter in (x, *mixer.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    exact = copy.deepcopy(mixer).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_bfloat16(name, how):
    mixer, x = make(name, torch.float32), image((4, 5), torch.float32)
    exact = mixer(x)
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x)
    else:
        y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", MIXERS)
def test_inference_before_training(name):
    mixer, x = make(name, torch.float32), image((3, 7), torch.float32)
    with torch.inference_mode():
        before = mixer(x)
    y = mixer(x)
    y.sum().backward()
    assert torch.equal(y, before)


@pytest.mark.parametrize("name", MIXERS)
def test_export(name):
    mixer, x = make(name, torch.float32), image((4, 6), torch.float32)
    exported = torch.export.export(mixer, (x,)).module()
    torch.testing.assert_close(exported(x), mixer(x))


@pytest.mark.parametrize("name", MIXERS)
def test_compile_in_one_graph(name):
    mixer, x = make(name, torch.float32), image((5, 6), torch.float32)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (compiled, mixer):
        mixer.zero_grad()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in mixer.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert_alike(actual, expected)


class Copies(TorchDispatchMode):
    """Counts elements that are written by nothing but copying."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::cat"):
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("shared", [True, False])
def test_scans_copy_no_token(shared):
    core = ssm.SelectiveSSM(channels=6, scans=4, states=3, rank=2)
    x = torch.randn(2, 1, 20, 6) if shared else torch.randn(4, 2, 20, 6).transpose(0, 1)
    with Copies() as copies:
        delta, B, C = core.project(x)
    assert copies.elements == 0
    assert delta.shape == (2, 4, 20, 6)
    assert B.shape == C.shape == (2, 4, 20, 3)
    assert B.untyped_storage().data_ptr() == C.untyped_storage().data_ptr()
    expected = torch.stack([x[:, g if not shared else 0] @ core.x_proj_weight[g].t() for g in range(4)], dim=1)
    torch.testing.assert_close(torch.cat((B, C), dim=-1), expected[..., 2:])
    for g in range(4):
        torch.testing.assert_close(delta[:, g], expected[:, g, :, :2] @ core.dt_projs_weight[g].t())


def test_merged_scans_are_the_sum():
    core = ssm.SelectiveSSM(channels=6, scans=2, states=3, rank=2).double()
    x, order = torch.randn(2, 1, 5, 6).double(), torch.tensor([[0, 1, 2, 3, 4], [4, 0, 3, 1, 2]], dtype=torch.int32)
    apart = core.scan(x, order, merge=False)
    assert apart.shape == (2, 2, 5, 6)
    torch.testing.assert_close(core.scan(x, order), apart.sum(1, keepdim=True))


def test_initialisation():
    torch.manual_seed(0)
    core = ssm.SelectiveSSM(channels=64, scans=4, states=16, rank=4)
    delta = F.softplus(core.dt_projs_bias)
    assert delta.min() >= 1e-3 * (1 - 1e-4)
    assert delta.max() <= 1e-1 * (1 + 1e-4)
    assert abs(delta.log().mean().item() - torch.tensor([1e-3, 1e-1]).log().mean().item()) < 0.3  # log-uniform
    torch.testing.assert_close(-torch.exp(core.A_logs), -torch.arange(1.0, 17).expand(4 * 64, 16))
    assert (core.Ds == 1).all()
    assert core.dt_projs_weight.abs().max() <= 4**-0.5
    assert core.x_proj_weight.abs().max() <= 64**-0.5


def test_a_direction_that_is_none():
    with pytest.raises(ValueError, match="'w'"):
        ssm.LocalScan(DIM, ("h", "w"))
