# Tests of parts: `cmake --build build/<tag> --target xkv-tests`, run by tests/native/test_programs.py.

add_custom_target(xkv-tests)

function(xkv_add_test name)
    add_executable(${name} EXCLUDE_FROM_ALL ${ARGN})
    target_compile_features(${name} PRIVATE cxx_std_17)
    target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/native" "${XKV_UPSTREAM_DIR}/include"
        "${XKV_UPSTREAM_DIR}/src" "${XKV_UPSTREAM_DIR}/ggml/include")
    set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
    add_dependencies(xkv-tests ${name})
endfunction()

xkv_add_test(xkv-test-select
    "${PROJECT_SOURCE_DIR}/tests/native/select.cpp"
    "${PROJECT_SOURCE_DIR}/native/flow/xkv-select.cpp"
    "${PROJECT_SOURCE_DIR}/native/window/xkv-chunks.cpp")

xkv_add_test(xkv-test-layers "${PROJECT_SOURCE_DIR}/tests/native/layers.cpp")
target_link_libraries(xkv-test-layers PRIVATE llama)
target_include_directories(xkv-test-layers PRIVATE "${PROJECT_SOURCE_DIR}/native/include")

# calls that fail, damaged files, two threads
if (CMAKE_SYSTEM_NAME STREQUAL "Linux")
    set(xkv_native "${PROJECT_SOURCE_DIR}/tests/native")
    set(xkv_scenes "${xkv_native}/faults/scenes.cpp")
    set(xkv_borders xkv-test-threads xkv-fuzz-sidecar xkv-fuzz-state)
    xkv_add_test(xkv-test-threads "${xkv_native}/threads.cpp" "${xkv_scenes}")
    xkv_add_test(xkv-fuzz-sidecar "${PROJECT_SOURCE_DIR}/tests/fuzz/sidecar.cpp")
    xkv_add_test(xkv-fuzz-state "${PROJECT_SOURCE_DIR}/tests/fuzz/state.cpp" "${xkv_scenes}")
    if (NOT XKV_SANITIZE) # which have memory functions of their own
        xkv_add_test(xkv-test-faults "${xkv_native}/faults/faults.cpp" "${xkv_native}/faults/hooks.cpp" "${xkv_scenes}")
        list(APPEND xkv_borders xkv-test-faults)
    endif()
    find_package(Threads REQUIRED)
    foreach(target IN LISTS xkv_borders)
        target_link_libraries(${target} PRIVATE llama Threads::Threads ${CMAKE_DL_LIBS})
        target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/native/include")
    endforeach()
endif()

# the op of the CPU backend against a plain reference, and its time beside flash attention
set(xkv_op "${PROJECT_SOURCE_DIR}/native/ops/xkv_attn")
xkv_add_test(xkv-test-attn "${xkv_op}/test/test.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp")
target_link_libraries(xkv-test-attn PRIVATE ggml)

# and of a device that is named
xkv_add_test(xkv-test-attn-device "${xkv_op}/test/test-device.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp")
target_link_libraries(xkv-test-attn-device PRIVATE ggml)

# its kernels for CUDA, which a shim runs on the CPU
if (CMAKE_SYSTEM_NAME STREQUAL "Linux")
    xkv_add_test(xkv-test-attn-cuda "${xkv_op}/test/test-cuda.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp")
    target_include_directories(xkv-test-attn-cuda PRIVATE "${PROJECT_SOURCE_DIR}/tests/shims")
    target_compile_options(xkv-test-attn-cuda PRIVATE -O2 -U_FORTIFY_SOURCE)
    target_link_libraries(xkv-test-attn-cuda PRIVATE ggml)
    # and those for Metal
    xkv_add_test(xkv-test-attn-metal "${xkv_op}/test/test-metal.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp")
    target_include_directories(xkv-test-attn-metal PRIVATE "${PROJECT_SOURCE_DIR}/tests/shims" "${PROJECT_SOURCE_DIR}/tests/shims/metal")
    target_compile_options(xkv-test-attn-metal PRIVATE -O2 -U_FORTIFY_SOURCE)
    find_package(Threads REQUIRED)
    target_link_libraries(xkv-test-attn-metal PRIVATE ggml Threads::Threads)
    xkv_add_test(xkv-test-shim-metal "${PROJECT_SOURCE_DIR}/tests/shims/test-metal.cpp")
    target_include_directories(xkv-test-shim-metal PRIVATE "${PROJECT_SOURCE_DIR}/tests/shims" "${PROJECT_SOURCE_DIR}/tests/shims/metal")
    target_compile_options(xkv-test-shim-metal PRIVATE -O2 -U_FORTIFY_SOURCE)
endif()

file(GLOB xkv_op_cpu "${xkv_op}/cpu/*.cpp")
list(FILTER xkv_op_cpu EXCLUDE REGEX "xkv-attn-cpu.cpp$")
xkv_add_test(xkv-bench-attn "${xkv_op}/test/bench.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp" ${xkv_op_cpu})
target_link_libraries(xkv-bench-attn PRIVATE ggml)
if (GGML_NATIVE AND NOT MSVC)
    target_compile_options(xkv-bench-attn PRIVATE -march=native)
endif()

# what `make test-gpu` and `make bench-gpu` run on a card, and `make test` on the CPU
foreach(name check bench)
    xkv_add_test(xkv-gpu-${name} "${PROJECT_SOURCE_DIR}/tests/gpu/attn-${name}.cpp" "${xkv_op}/xkv-tiles.cpp" "${xkv_op}/xkv-attn-op.cpp")
    target_link_libraries(xkv-gpu-${name} PRIVATE ggml)
endforeach()

# tiny models of all architectures, by upstream's own test
if (UNIX)
    xkv_add_test(xkv-tiny-archs "${PROJECT_SOURCE_DIR}/tests/native/archs.cpp")
    target_include_directories(xkv-tiny-archs PRIVATE "${PROJECT_SOURCE_DIR}/tests/shims/upstream" "${XKV_UPSTREAM_DIR}")
    target_compile_options(xkv-tiny-archs PRIVATE -Wno-unused-function)
    target_link_libraries(xkv-tiny-archs PRIVATE llama)
endif()
