# What goes into the wheel: the component xkv, so that upstream's own install rules stay out of it.

set(xkv_libraries llama ggml ggml-base)
foreach(backend IN LISTS GGML_AVAILABLE_BACKENDS)
    if (TARGET ${backend})
        list(APPEND xkv_libraries ${backend})
    endif()
endforeach()
list(REMOVE_DUPLICATES xkv_libraries)

if (APPLE)
    set(xkv_origin "@loader_path")
else()
    set(xkv_origin "$ORIGIN")
endif()

foreach(library IN LISTS xkv_libraries)
    # a wheel stores each versioned symbolic link as one more copy of the library
    set_property(TARGET ${library} PROPERTY VERSION)
    set_property(TARGET ${library} PROPERTY SOVERSION)
    set_target_properties(${library} PROPERTIES
        INSTALL_RPATH          "${xkv_origin}"
        BUILD_WITH_INSTALL_RPATH ON)
    install(TARGETS ${library}
        LIBRARY DESTINATION xkv_gguf/lib COMPONENT xkv
        RUNTIME DESTINATION xkv_gguf/lib COMPONENT xkv)
endforeach()

# cuBLAS and the driver stay where they are, which need not be a place that the system's linker looks into
if (TARGET ggml-cuda)
    set_property(TARGET ggml-cuda PROPERTY INSTALL_RPATH_USE_LINK_PATH ON)
endif()

if (XKV_LAPACK_FILE)
    install(FILES "${XKV_LAPACK_FILE}" DESTINATION xkv_gguf/lib COMPONENT xkv)
    install(FILES "${XKV_LAPACK_LICENSE}" DESTINATION xkv_gguf/lib RENAME LICENSE-openblas.txt COMPONENT xkv)
endif()

install(FILES "${PROJECT_SOURCE_DIR}/native/include/xkv.h" DESTINATION xkv_gguf/include COMPONENT xkv)
install(FILES "${XKV_GENERATED_DIR}/_build_info.py"        DESTINATION xkv_gguf         COMPONENT xkv)

# upstream's converter, to turn Hugging Face folders into GGUF
install(FILES "${XKV_UPSTREAM_DIR}/convert_hf_to_gguf.py" "${XKV_UPSTREAM_DIR}/LICENSE"
    DESTINATION xkv_gguf/_upstream COMPONENT xkv)
install(DIRECTORY "${XKV_UPSTREAM_DIR}/conversion" "${XKV_UPSTREAM_DIR}/licenses"
    DESTINATION xkv_gguf/_upstream COMPONENT xkv PATTERN "__pycache__" EXCLUDE)
install(DIRECTORY "${XKV_UPSTREAM_DIR}/gguf-py/gguf" DESTINATION xkv_gguf/_upstream/gguf-py COMPONENT xkv
    PATTERN "__pycache__" EXCLUDE)
install(FILES "${XKV_UPSTREAM_DIR}/gguf-py/LICENSE" DESTINATION xkv_gguf/_upstream/gguf-py COMPONENT xkv)
