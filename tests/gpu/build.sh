#!/bin/sh
# Builds the library and the programs in this folder: build.sh gpu [ARCH], or build.sh cpu. What CMake does not find by itself
# is looked for: cuBLAS where a Python package brings it, libcuda where the driver put it and the toolkit has no stub.
set -eu
cd "$(dirname "$0")/../.."
device=$1
PYTHON=${PYTHON:-python3}

fail() {
    echo "build: $1" >&2
    exit 1
}
first() { # the first file that there is
    for file in "$@"; do
        if [ -e "$file" ]; then
            echo "$file"
            return
        fi
    done
}
command -v cmake > /dev/null || fail "no cmake"
"$PYTHON" -c 'import sys, numpy; sys.exit(sys.version_info < (3, 10))' 2> /dev/null || fail "no Python 3.10 or newer with numpy ($PYTHON)"

set -- -S . -B build -DCMAKE_BUILD_TYPE=Release -DGGML_RPC=OFF "-DPython_EXECUTABLE=$(command -v "$PYTHON")"
command -v ninja > /dev/null && [ ! -e build/Makefile ] && set -- "$@" -G Ninja
libraries=
if [ "$device" = gpu ]; then
    arch=${ARCH:-$(sh tests/gpu/card.sh)}
    nvcc=$(command -v nvcc || first /usr/local/cuda/bin/nvcc)
    [ -n "$nvcc" ] || fail "no nvcc"
    toolkit=$(readlink -f "$("$nvcc" --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p')")
    major=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
    set -- "$@" -DGGML_CUDA=ON -DGGML_CUDA_FA=ON -DGGML_CUDA_NCCL=OFF "-DCMAKE_CUDA_ARCHITECTURES=$arch" "-DCMAKE_CUDA_COMPILER=$nvcc"

    targets=$toolkit/targets/x86_64-linux
    libraries=$(dirname "$(first "$toolkit/lib64/libcudart.so" "$targets/lib/libcudart.so")")
    if [ -z "$(first "$toolkit/lib64/libcublas.so" "$targets/lib/libcublas.so" /usr/lib/x86_64-linux-gnu/libcublas.so)" ]; then
        packages=${CUBLAS_PACKAGES:-$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')}
        cublas=$(first "$packages/nvidia/cu$major"/lib/libcublas.so.* "$packages"/nvidia/cublas/lib/libcublas.so.*)
        [ -n "$cublas" ] || fail "no cuBLAS, neither in $toolkit nor as a Python package (nvidia-cublas) in $packages"
        from=$(dirname "$cublas")
        libraries=$libraries:$from
        # its headers alone: beside them can be a runtime's of another version
        mkdir -p build/cublas
        ln -sf "$(dirname "$from")"/include/cublas*.h build/cublas/
        set -- "$@" "-DCUDA_cublas_LIBRARY=$cublas" "-DCUDA_cublasLt_LIBRARY=$(first "$from"/libcublasLt.so.*)"
        set -- "$@" "-DCMAKE_CUDA_FLAGS=-I$PWD/build/cublas"
    fi
    if [ -z "$(first "$toolkit/lib64/stubs/libcuda.so" "$targets/lib/stubs/libcuda.so" /usr/lib/x86_64-linux-gnu/libcuda.so)" ]; then
        cuda=${LIBCUDA:-$(first "$(ldconfig -p | sed -n 's/.*libcuda\.so\.1 .*=> //p' | head -n 1)" /usr/local/nvidia/lib64/libcuda.so.1)}
        [ -n "$cuda" ] || fail "no libcuda.so.1 of the driver, and no stub of it in $toolkit"
        libraries=$libraries:$(dirname "$cuda")
        set -- "$@" "-DCUDA_cuda_driver_LIBRARY=$cuda"
    fi
fi

jobs=${JOBS:-$(nproc)}
mkdir -p build results
PYTHONPATH=build/lapack cmake "$@" > build/configure.log 2>&1 || { tail -n 20 build/configure.log >&2; fail "CMake failed: build/configure.log"; }
begin=$(date +%s)
if ! cmake --build build --parallel "$jobs" > build/build.log 2>&1; then
    grep -E 'error|undefined reference|multiple definition' build/build.log | cut -c 1-300 | head -n 20 >&2
    fail "the compiler failed: build/build.log"
fi
cmake --build build --parallel "$jobs" --target xkv-gpu-check --target xkv-gpu-bench >> build/build.log 2>&1 || fail "build/build.log"
cmake --install build --prefix python --component xkv > build/install.log 2>&1 || fail "build/install.log"
echo "$libraries" > build/library-path
echo "built for $device${arch:+, sm_$arch} in $(($(date +%s) - begin)) s"
