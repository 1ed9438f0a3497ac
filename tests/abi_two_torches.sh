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
from mambaout_kernels import _C, backends, gated_dwconv
from mambaout_kernels.reference import ACTIVATIONS

assert _C.__file__.startswith(sys.argv[1]), _C.__file__
torch.manual_seed(0)
results = hashlib.sha256()
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
for dtype, act, isa in itertools.product(dtypes, ACTIVATIONS, _C.supported_cpu_capabilities()):
    _C.set_cpu_capability(isa)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 9, 5, 2 * 41), (19, 1, 7, 7), (19,))]
    inputs = [t.to(dtype).requires_grad_() for t in inputs]
    y = gated_dwconv(*inputs, act)
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    with backends.force("reference"):
        expected = gated_dwconv(*inputs, act)
        expected = (expected, *torch.autograd.grad(expected.square().sum(), inputs))
    for got, want in zip((y, *gradients), expected):
        # As between two ways to round; that the kernels are accurate is for the other tests to show.
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        assert error < 20 * torch.finfo(dtype).eps, (dtype, act, isa, error)
        results.update(got.detach().double().flatten().view(torch.uint8).numpy().tobytes())
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
