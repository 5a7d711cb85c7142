# Sanitizers, in a build folder of their own (`make test-asan`, `make test-tsan`). The graphs of llama.cpp's models are left out:
# they are most of its code, and touch no memory but through ggml. What is undefined is looked for in our own sources.
# Included twice: before upstream for its flags, and when all targets are there.

set(XKV_SANITIZE "" CACHE STRING "Sanitizers of GCC and Clang, such as address,undefined; for a build folder of its own")

if (NOT XKV_SANITIZE)
    return()
endif()

if (NOT TARGET llama)
    # without assertions, as the library is released: a state or a model can hold numbers that they end the process for. Line tables
    # name where a report comes from
    set(CMAKE_C_FLAGS_RELEASE   "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer")
    set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer")
    add_link_options(-fsanitize=${XKV_SANITIZE})
    return()
endif()

string(REGEX REPLACE ",?undefined" "" xkv_sanitize_all "${XKV_SANITIZE}")

function(xkv_sanitize target)
    get_target_property(folder ${target} SOURCE_DIR)
    get_target_property(sources ${target} SOURCES)
    foreach(source IN LISTS sources)
        get_filename_component(path "${source}" ABSOLUTE BASE_DIR "${folder}")
        if (NOT path MATCHES "\\.(c|cpp)$" OR path MATCHES "/src/models/")
            continue()
        endif()
        string(FIND "${path}" "${PROJECT_SOURCE_DIR}/native/" at)
        if (at EQUAL 0)
            set(what "${XKV_SANITIZE}")
        else()
            set(what "${xkv_sanitize_all}")
        endif()
        set_property(SOURCE "${path}" TARGET_DIRECTORY ${target} APPEND PROPERTY
            COMPILE_OPTIONS -fsanitize=${what} -fno-sanitize-recover=all)
    endforeach()
endfunction()

get_property(xkv_ggml_targets DIRECTORY "${XKV_UPSTREAM_DIR}/ggml/src" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS xkv_ggml_targets ITEMS llama)
    if (target MATCHES "^(ggml-base|ggml-cpu.*|llama)$")
        xkv_sanitize(${target})
    endif()
endforeach()
get_property(xkv_test_targets DIRECTORY "${PROJECT_SOURCE_DIR}" PROPERTY BUILDSYSTEM_TARGETS)
foreach(target IN LISTS xkv_test_targets)
    get_target_property(type ${target} TYPE)
    if (type STREQUAL "EXECUTABLE")
        target_compile_options(${target} PRIVATE -fsanitize=${XKV_SANITIZE} -fno-sanitize-recover=all)
    endif()
endforeach()
