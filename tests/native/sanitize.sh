#!/bin/sh
# Builds the library with sanitizers and runs tests with it, from the checkout's folder: sanitize.sh asan [PYTEST OPTIONS]
# (tests/native, but for the demo model), sanitize.sh tsan (two contexts in two threads, on this project's threads and ggml's: what
# OpenMP's library synchronizes, the sanitizer does not see).
set -eu
kind=$1
folder=build/sanitize/$kind
venv=.venv/bin
case $kind in
asan) options="-DXKV_SANITIZE=address,undefined" targets="llama ggml xkv-tests" ;;
tsan) options="-DXKV_SANITIZE=thread -DGGML_OPENMP=OFF" targets="xkv-test-threads" ;;
*) echo "sanitize.sh: $kind is not known, expected asan or tsan" >&2; exit 1 ;;
esac

mkdir -p "$folder"
echo "building with sanitizers in $folder (the first time takes some minutes)"
$venv/cmake -G Ninja -S . -B "$folder" -DCMAKE_MAKE_PROGRAM="$PWD/$venv/ninja" -DPython_EXECUTABLE="$PWD/$venv/python" \
    -DCMAKE_BUILD_TYPE=Release $options > "$folder.log" 2>&1 || { tail -n 20 "$folder.log" >&2; exit 1; }
$venv/cmake --build "$folder" --target $targets >> "$folder.log" 2>&1 || { tail -n 20 "$folder.log" >&2; exit 1; }

if [ "$kind" = tsan ]; then
    TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1" \
        "$folder/tests/xkv-test-threads" build/scene/model.gguf build/scene/model.xkv.gguf build/scene
    echo "tsan: two contexts in two threads, nothing found"
    exit 0
fi

# the library as an installed package, which the loader prefers to the one of the environment
site=$folder/site
$venv/cmake --install "$folder" --component xkv --prefix "$site" > /dev/null
mkdir -p "$site/xkv_gguf-0.dist-info"
printf 'Metadata-Version: 2.1\nName: xkv-gguf\nVersion: 0\n' > "$site/xkv_gguf-0.dist-info/METADATA"

# Python keeps what it allocates: leaks are looked for by xkv-test-faults
export ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=1"
export UBSAN_OPTIONS="print_stacktrace=1"
for name in xkv-fuzz-sidecar xkv-fuzz-state; do
    test $name = xkv-fuzz-state && model=build/scene/model.gguf folder_of=build/scene || model= folder_of=
    "$folder/tests/$name" $model build/scene/model.xkv.gguf $folder_of 1000 1
done
PYTHONPATH="$site" LD_PRELOAD="$(${CC:-cc} -print-file-name=libasan.so) $(${CC:-cc} -print-file-name=libubsan.so)" \
    $venv/python -m pytest tests/native --programs "$folder/tests" ${2:-}
