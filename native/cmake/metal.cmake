# Kernels of ops for Metal, as one of ggml-metal's kernel sources: its lists name kernels/xkv_attn.metal (patch 0009).

set(xkv_metal_dir "${PROJECT_SOURCE_DIR}/native/ops/xkv_attn/metal")
file(GLOB xkv_metal_kernels CONFIGURE_DEPENDS "${xkv_metal_dir}/*.metal" "${xkv_metal_dir}/*.h")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${xkv_metal_kernels} "${CMAKE_CURRENT_LIST_DIR}/metal.py")

execute_process(
    COMMAND "${Python_EXECUTABLE}" -B "${CMAKE_CURRENT_LIST_DIR}/metal.py" "${xkv_metal_dir}/xkv-attn.metal"
        "${XKV_UPSTREAM_DIR}/ggml/src/ggml-metal/kernels/xkv_attn.metal"
    COMMAND_ERROR_IS_FATAL ANY)
