# _tile_loadconfig of older GCC tells the compiler that it reads 8 of its 64 bytes, so that the stores to the rest go missing and
# ggml's products fault (GCC PR 114098, mended in 12.4 and 13.3). There the CPU computes without AMX.

if (CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64"
        AND (CMAKE_CXX_COMPILER_VERSION VERSION_LESS 12.4
            OR (CMAKE_CXX_COMPILER_VERSION VERSION_GREATER_EQUAL 13 AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13.3)))
    get_property(xkv_ggml_targets DIRECTORY "${XKV_UPSTREAM_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
    foreach (target ${xkv_ggml_targets})
        if (target MATCHES "^ggml-cpu")
            target_compile_options(${target} PRIVATE -mno-amx-int8) # after -march=native, which turns it on
        endif()
    endforeach()
endif()
