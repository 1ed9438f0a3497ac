#!/usr/bin/env bash
# One binary, two torches: the compiled module built with each interpreter's torch runs under both, and gives the same
# bits. Both need one Python version, torch, numpy, setuptools, cmake, ninja and pybind11, and may be virtual environments.
set -euo pipefail
if [ $# -ne 2 ]; then
  echo "usage: $0 PYTHON_WITH_ONE_TORCH PYTHON_WITH_ANOTHER (make abi TORCH_A=... TORCH_B=...)" >&2
  exit 2
fi
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/run.py" <<'PYTHON'
import hashlib, itertools, sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
from mambaout_kernels import _C, FusedGatedCNNBlock, backends, gated_dwconv
from mambaout_kernels.ops.linear import linear
from mambaout_kernels.nn.downsample import Downsample
from mambaout_kernels.nn.block import LAYER_NORM
from mambaout_kernels.reference import ACTIVATIONS

assert _C.__file__.startswith(sys.argv[1]), _C.__file__
torch.manual_seed(0)
results, used = hashlib.sha256(), set()


class Used(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        used.add(str(op))
        return op(*args, **kwargs or {})


def compare(what, compute, dtype):
    """The results of compute() on the kernels go into the hash, and are near those of the reference."""
    with Used():
        got = compute()
    with backends.force("reference"):
        expected = compute()
    for ours, theirs in zip(got, expected, strict=True):
        # As between two ways to round; that the kernels are accurate is for the other tests to show.
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error < 20 * torch.finfo(dtype).eps, (what, dtype, error)
        results.update(ours.detach().double().flatten().view(torch.uint8).numpy().tobytes())


def with_gradients(y, inputs):
    return (y, *torch.autograd.grad(y.square().sum(), inputs))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
for dtype, act, isa in itertools.product(dtypes, ACTIVATIONS, _C.supported_cpu_capabilities()):
    _C.set_cpu_capability(isa)
    inputs = [random(*shape).to(dtype).requires_grad_() for shape in ((2, 9, 5, 2 * 41), (19, 1, 7, 7), (19,))]
    compare((act, isa), lambda: with_gradients(gated_dwconv(*inputs, act), inputs), dtype)
for isa in _C.supported_cpu_capabilities():
    _C.set_cpu_capability(isa)
    for dtype in (torch.float32, torch.bfloat16):
        for module in (FusedGatedCNNBlock(24), Downsample(24, 40, False, LAYER_NORM)):
            for parameter in module.parameters():
                parameter.data = random(*parameter.shape) / parameter[0].numel() ** 0.5
            module, x = module.to(dtype).eval(), random(2, 9, 6, 24).to(dtype)
            with torch.inference_mode():
                compare((type(module).__name__, isa), lambda: (module(x),), dtype)
    if isa != "portable":  # there PyTorch multiplies
        inputs = [random(*shape).float().requires_grad_() for shape in ((2, 9, 5, 24), (40, 24), (40,))]
        compare(("linear", isa), lambda: with_gradients(linear(*inputs), inputs), torch.float32)
ops = ("gated_dwconv", "gated_dwconv_backward", "gated_cnn_block", "downsample", "linear", "linear_dx", "linear_dweight")
assert {f"mambaout_kernels.{op}.default" for op in ops} <= used, used
binary = hashlib.sha256(open(_C.__file__, "rb").read()).hexdigest()
built = _C.build_info()["torch_built_with"]
print(f"binary {binary[:12]} built with torch {built:<14} under torch {torch.__version__:<14} bits {results.hexdigest()[:12]}")
PYTHON

for builder in "$1" "$2"; do
  target="$work/$(echo "$builder" | tr -c 'a-zA-Z0-9\n' _)"
  "$builder" setup.py -q build --build-base "$target" --build-lib "$target/lib" > "$target.log" 2>&1 || true
  compgen -G "$target/lib/mambaout_kernels/_C.*[!i]" > /dev/null || { cat "$target.log" >&2; exit 1; }
  for runner in "$1" "$2"; do
    (cd "$work" && PYTHONPATH="$target/lib" "$runner" run.py "$target/lib")
  done
done | tee "$work/table"
bits=$(awk '{print $NF}' "$work/table" | sort -u | wc -l)
[ "$bits" = 1 ] || { echo "results differ between the torches" >&2; exit 1; }
