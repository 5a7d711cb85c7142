# Adds our sources to upstream's llama target: one libllama exports llama_* and xkv_*.

# a room includes only those before it: tests/build/test_rooms.py
set(xkv_rooms base format store window flow attn cache api)

set(xkv_sources)
foreach(room IN LISTS xkv_rooms)
    file(GLOB files CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/native/${room}/*.cpp" "${PROJECT_SOURCE_DIR}/native/${room}/*.h")
    list(APPEND xkv_sources ${files})
endforeach()
file(GLOB xkv_op_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/native/ops/*/*.cpp" "${PROJECT_SOURCE_DIR}/native/ops/*/*.h")
list(APPEND xkv_sources ${xkv_op_sources} "${XKV_GENERATED_DIR}/xkv-build-id.cpp")

# the command that writes the build id belongs to this directory, the target to upstream's
add_custom_target(xkv-build-id DEPENDS "${XKV_GENERATED_DIR}/xkv-build-id.cpp")
add_dependencies(llama xkv-build-id)
set_source_files_properties("${XKV_GENERATED_DIR}/xkv-build-id.cpp" TARGET_DIRECTORY llama PROPERTIES GENERATED ON)

target_sources(llama PRIVATE ${xkv_sources})
target_include_directories(llama PRIVATE "${PROJECT_SOURCE_DIR}/native/include" "${PROJECT_SOURCE_DIR}/native")
set_source_files_properties(${xkv_sources} TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)

# ops of the CPU backend; with GGML_CPU_ALL_VARIANTS there is a target per instruction set
file(GLOB xkv_ggml_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/native/ggml/*.c"
    "${PROJECT_SOURCE_DIR}/native/ops/*/cpu/*.cpp")
foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)
    if (backend MATCHES "^ggml-cpu" AND TARGET ${backend})
        target_sources(${backend} PRIVATE ${xkv_ggml_sources})
        target_include_directories(${backend} PRIVATE "${PROJECT_SOURCE_DIR}/native/ops/xkv_attn/cpu")
    endif()
endforeach()

# and of the CUDA backend; HIP and MUSA build its dispatch as well, and find there that they do not have it
set(xkv_cuda_dir "${PROJECT_SOURCE_DIR}/native/ops/xkv_attn/cuda")
foreach(backend ggml-cuda ggml-hip ggml-musa)
    if (TARGET ${backend})
        target_include_directories(${backend} PRIVATE "${xkv_cuda_dir}")
    endif()
endforeach()
if (TARGET ggml-cuda)
    target_sources(ggml-cuda PRIVATE "${xkv_cuda_dir}/xkv-attn.cu" "${xkv_cuda_dir}/xkv-attn-cuda.cu")
endif()

# and of the Metal backend; its kernels are in metal.cmake
if (TARGET ggml-metal)
    target_include_directories(ggml-metal PRIVATE "${xkv_metal_dir}")
    target_sources(ggml-metal PRIVATE "${xkv_metal_dir}/xkv-attn-metal.cpp" "${xkv_metal_dir}/xkv-mtl-plan.cpp")
endif()
