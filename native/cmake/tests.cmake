# Tests of parts that need no model: `cmake --build build/<tag> --target xkv-tests`, run by tests/native/test_select.py.

add_executable(xkv-tests EXCLUDE_FROM_ALL
    "${PROJECT_SOURCE_DIR}/tests/native/select.cpp"
    "${PROJECT_SOURCE_DIR}/native/flow/xkv-select.cpp"
    "${PROJECT_SOURCE_DIR}/native/window/xkv-chunks.cpp")
target_compile_features(xkv-tests PRIVATE cxx_std_17)
target_include_directories(xkv-tests PRIVATE "${PROJECT_SOURCE_DIR}/native" "${XKV_UPSTREAM_DIR}/include"
    "${XKV_UPSTREAM_DIR}/src" "${XKV_UPSTREAM_DIR}/ggml/include")
set_target_properties(xkv-tests PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${PROJECT_BINARY_DIR}/tests")
