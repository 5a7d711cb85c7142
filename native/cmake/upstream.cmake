# Puts the patched llama.cpp at XKV_UPSTREAM_DIR; see upstream.py.

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

set(XKV_LLAMA_CPP_SOURCE "" CACHE PATH "llama.cpp checkout to build instead of the pinned sdist; it is copied, not changed")
set(XKV_CACHE_DIR "${PROJECT_SOURCE_DIR}/.cache" CACHE PATH "Folder that keeps the pinned sdist")

set(XKV_PIN_FILE     "${PROJECT_SOURCE_DIR}/upstream.json")
set(XKV_PATCHES_DIR  "${PROJECT_SOURCE_DIR}/native/patches")
set(XKV_UPSTREAM_OUT "${PROJECT_BINARY_DIR}/upstream")
set(XKV_UPSTREAM_DIR "${XKV_UPSTREAM_OUT}/llama.cpp")
set(XKV_UPSTREAM_KEY "${XKV_UPSTREAM_OUT}/key")

file(GLOB XKV_PATCHES CONFIGURE_DEPENDS "${XKV_PATCHES_DIR}/*.patch")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${XKV_PIN_FILE}" ${XKV_PATCHES} "${CMAKE_CURRENT_LIST_DIR}/upstream.py")

set(xkv_source_args "")
if (XKV_LLAMA_CPP_SOURCE)
    set(xkv_source_args --source "${XKV_LLAMA_CPP_SOURCE}")
endif()

execute_process(
    COMMAND "${Python_EXECUTABLE}" -B "${CMAKE_CURRENT_LIST_DIR}/upstream.py"
        --pin "${XKV_PIN_FILE}" --patches "${XKV_PATCHES_DIR}" --cache "${XKV_CACHE_DIR}" --out "${XKV_UPSTREAM_OUT}"
        ${xkv_source_args}
    RESULT_VARIABLE xkv_result
    ERROR_VARIABLE  xkv_error
    ERROR_STRIP_TRAILING_WHITESPACE)
if (NOT xkv_result EQUAL 0)
    message(FATAL_ERROR "${xkv_error}")
endif()

file(READ "${XKV_PIN_FILE}" xkv_pin)
string(JSON XKV_UPSTREAM_PACKAGE GET "${xkv_pin}" package)
string(JSON XKV_UPSTREAM_VERSION GET "${xkv_pin}" version)
