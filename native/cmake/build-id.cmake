# Two modes of one file.
# Included: adds the command that writes the build id, a hash over native/ and the patched upstream's key, at build
# time, so that an edit of a source is in the id without a new configure run.
# Run as a script (-P) by that command: writes OUT_DIR/xkv-build-id.cpp and OUT_DIR/_build_info.py.

if (CMAKE_SCRIPT_MODE_FILE)
    file(GLOB_RECURSE files RELATIVE "${NATIVE_DIR}" "${NATIVE_DIR}/*")
    list(FILTER files EXCLUDE REGEX "__pycache__")
    list(SORT files)
    # native/ and the pin alone: what Python in a checkout can compute again, see xkv_gguf/runtime/loader.py
    foreach(file IN LISTS files ITEMS "../upstream.json")
        file(SHA256 "${NATIVE_DIR}/${file}" hash)
        string(APPEND native "\n${file} ${hash}")
    endforeach()
    file(READ "${UPSTREAM_KEY}" key)
    string(SHA256 hash "${native}")
    string(SUBSTRING "${hash}" 0 32 XKV_NATIVE_ID)
    string(SHA256 hash "${key}${native}")
    string(SUBSTRING "${hash}" 0 32 XKV_BUILD_ID)
    configure_file("${NATIVE_DIR}/api/xkv-build-id.cpp.in" "${OUT_DIR}/xkv-build-id.cpp" @ONLY)
    configure_file("${NATIVE_DIR}/cmake/_build_info.py.in" "${OUT_DIR}/_build_info.py"   @ONLY)
    return()
endif()

set(XKV_GENERATED_DIR "${PROJECT_BINARY_DIR}/generated")
file(GLOB_RECURSE xkv_native_files CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/native/*")
list(FILTER xkv_native_files EXCLUDE REGEX "__pycache__")

add_custom_command(
    OUTPUT  "${XKV_GENERATED_DIR}/xkv-build-id.cpp"
    BYPRODUCTS "${XKV_GENERATED_DIR}/_build_info.py"
    COMMAND "${CMAKE_COMMAND}"
        "-DNATIVE_DIR=${PROJECT_SOURCE_DIR}/native" "-DUPSTREAM_KEY=${XKV_UPSTREAM_KEY}"
        "-DOUT_DIR=${XKV_GENERATED_DIR}" "-DXKV_UPSTREAM=${XKV_UPSTREAM_NAME}" -P "${CMAKE_CURRENT_LIST_FILE}"
    COMMAND "${CMAKE_COMMAND}" -E touch "${XKV_GENERATED_DIR}/xkv-build-id.cpp"
    DEPENDS ${xkv_native_files} "${PROJECT_SOURCE_DIR}/upstream.json" "${XKV_UPSTREAM_KEY}"
    COMMENT "Writing the build id"
    VERBATIM)
