# make bench: set-up, then the main job. make test: set-up, then the tests. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
NATIVE := $(wildcard $(foreach depth,* */* */*/*,$(addprefix csrc/$(depth),.h .cpp .cu .cuh .txt .cmake)))
BENCH_OUT ?= benchmarks/results
CPP := '*.h' '*.cpp' '*.cu' '*.cuh'

# Tests by file on two processes, in the order of the files: those with few tests, which take long, are not the last.
# No test asserts a time.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# The CUDA kernels, where nvcc is: for the card at hand; without one, for one kind of card, to see that they compile.
CARDS = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | paste -sd ';' -)
export TORCH_CUDA_ARCH_LIST ?= $(or $(CARDS),9.0+PTX)

.PHONY: bench test test-fast nightly processors amx sanitize lint docs format abi gpu-acceptance clean

bench: $(READY)
	$(RUN) -m mambaout_kernels bench main --out $(BENCH_OUT)

test: $(READY)
	$(RUN) -m pytest tests $(PARALLEL)
	@if [ -d tests/triton_interpreter ]; then TRITON_INTERPRET=1 $(RUN) -m pytest tests/triton_interpreter -n 2; fi

# While working: of every test its first case, without those that build, start other runtimes or take seconds.
test-fast: $(READY)
	$(RUN) -m pytest tests --fast $(PARALLEL)

# Ten times as many generated cases as make test, tensors beyond 2^31 elements (some 14 GiB of memory), and ten minutes of
# training, inference and changes in random order (tests/soak).
nightly: $(READY)
	$(RUN) -m pytest tests --hypothesis-profile=nightly -m "generated or nightly"
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/triton_interpreter --hypothesis-profile=nightly -m "generated or nightly"

# Every comparison with eager again, eager held to what other processors have; the kernels run on all that this one has.
# A setting beyond the processor changes nothing. inductor refuses to go with some of them.
NUMERICS = $(shell grep -lE 'assert_(model_)?accurate|check_(backend|outputs)|scans\.y_bound' -r tests --include=test_*.py --exclude-dir=triton_interpreter)
processors: $(READY)
	@set -e; for isa in "default SSE41 SSE4_2" "avx2 AVX2 AVX2" "avx512 AVX512_CORE AVX512"; do set -- $$isa; \
	  echo "eager on $$1"; \
	  ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3 $(RUN) -m pytest -q $(NUMERICS) -k "not inductor"; done

# The tests of ops, modules and models with AMX in use, on any processor: in a copy of the tree, whose module has the unit
# of AMX, its tile instructions in C++, beside portable C++.
AMX_TREE := build/amx/tree
amx: $(READY)
	rm -rf $(AMX_TREE) && mkdir -p $(AMX_TREE) && git ls-files -z | xargs -0 cp --parents -t $(AMX_TREE)
	$(VENV)/bin/cmake -S $(AMX_TREE) -B build/amx/module -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) -DMAMBAOUT_EMULATED_AMX=ON -DMAMBAOUT_CUDA=OFF \
	  -DPython_EXECUTABLE=$(abspath $(RUN)) -Dpybind11_DIR=$$($(RUN) -m pybind11 --cmakedir)
	$(VENV)/bin/cmake --build build/amx/module --target _C
	$(VENV)/bin/cmake --install build/amx/module --prefix $(AMX_TREE)/mambaout_kernels --component cpu
	cd $(AMX_TREE) && PYTHONPATH=$$PWD $(abspath $(RUN)) -m pytest -q $(PARALLEL) \
	  $(addprefix tests/,nn ops models inference benchmarking csrc/test_amx.py)

# The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: tests/cpu_launch. Then the ops
# under the first two, in 200,000 calls with valid, unusual and wrong arguments: tests/fuzz, half an hour.
sanitize: $(READY)
	$(RUN) -m pytest tests/csrc/test_cpu_launch.py tests/comparators/test_scan_launch.py -m "sanitize or not sanitize"
	$(RUN) tests/fuzz/fuzzer.py --sanitize --calls 200000

lint: $(READY) docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files $(CPP))

# The pages of docs/ with the API reference, in build/site. A broken link or a name that is not there is an error.
docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files $(CPP))

# On the day a GPU is there: it builds for the card, and installs nothing. ARGS="--plan B"; ARGS=--dry: on the CPU.
gpu-acceptance:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) benchmarks/gpu_acceptance.py --out $(BENCH_OUT)/gpu_acceptance $(ARGS)

# One binary under two torches: make abi TORCH_A=python-with-one-torch TORCH_B=python-with-another
abi:
	bash tests/abi_two_torches.sh $(TORCH_A) $(TORCH_B)

# torch first: what is built next is built against the one that is there.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "torch>=2.10" torchvision numpy
	touch $@

$(READY): $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	$(RUN) -m pip install --quiet "cmake>=3.18" ninja "pybind11>=2.12" "setuptools>=77"
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(RUN) -m mambaout_kernels info
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info mambaout_kernels/_C*.so $(BENCH_OUT)
