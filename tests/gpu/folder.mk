# make test | bench | bench-full: on the first NVIDIA card of this machine, or with DEVICE=cpu a rehearsal without one.
# Needs a C++ compiler, CMake, nvcc and cuBLAS, Python 3.10 or newer with numpy; no network. Results are in results/.

DEVICE ?= gpu
PYTHON ?= python3
TEST   ?=
BENCH  ?=

RUN = CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} LD_LIBRARY_PATH="$$(cat build/library-path):$$LD_LIBRARY_PATH" \
      PYTHONPATH=python PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WHERE = --device $(DEVICE) --programs build/tests --results results

.PHONY: build test bench bench-full card

build: card
	@PYTHON=$(PYTHON) sh tests/gpu/build.sh $(DEVICE)

card:
	@test $(DEVICE) = cpu || sh tests/gpu/card.sh > /dev/null

test: build
	@$(RUN) $(PYTHON) -m tests.gpu.check $(WHERE) $(TEST)

# 4 layers, at most 4 minutes; bench-full: all 32, as long as it takes
bench: build
	@$(RUN) $(PYTHON) -m tests.gpu.bench $(WHERE) $(BENCH)

bench-full: build
	@$(RUN) $(PYTHON) -m tests.gpu.bench $(WHERE) --layers 32 --seconds 86400 $(BENCH)
