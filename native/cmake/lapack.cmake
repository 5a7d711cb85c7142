# LAPACK for the small eigenproblems of online bases: Apple's Accelerate, or the OpenBLAS that the PyPI package
# scipy-openblas32 carries (its symbols have a prefix, so that it can live beside NumPy's), or the system's.

set(XKV_LAPACK "" CACHE STRING "LAPACK to use: pip (scipy-openblas32) or system; default: pip, system on Apple")
set(xkv_lapack_package "scipy-openblas32")

if (NOT XKV_LAPACK)
    if (APPLE)
        set(XKV_LAPACK system)
    else()
        set(XKV_LAPACK pip)
    endif()
endif()

if (XKV_LAPACK STREQUAL "system")
    find_package(LAPACK REQUIRED)
    target_link_libraries(llama PRIVATE LAPACK::LAPACK)
elseif (XKV_LAPACK STREQUAL "pip")
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -c "import scipy_openblas32 as s; print(s.get_lib_dir() + '/' + s.get_library(fullname=True))"
        OUTPUT_VARIABLE xkv_lapack_file
        RESULT_VARIABLE xkv_result
        OUTPUT_STRIP_TRAILING_WHITESPACE
        ERROR_QUIET)
    if (NOT xkv_result EQUAL 0)
        message(FATAL_ERROR "Python ${Python_EXECUTABLE} has no package ${xkv_lapack_package}, whose LAPACK the build links: "
            "run `pip install ${xkv_lapack_package}`, or pass -DXKV_LAPACK=system for the system's LAPACK")
    endif()
    get_filename_component(xkv_lapack_name "${xkv_lapack_file}" NAME)
    set(XKV_LAPACK_FILE "${PROJECT_BINARY_DIR}/bin/${xkv_lapack_name}")
    configure_file("${xkv_lapack_file}" "${XKV_LAPACK_FILE}" COPYONLY)

    # its licences travel with it
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -c "import importlib.metadata as m; print(next((f.locate() for f in m.files('${xkv_lapack_package}') if f.name.startswith('LICENSE')), ''))"
        OUTPUT_VARIABLE XKV_LAPACK_LICENSE
        OUTPUT_STRIP_TRAILING_WHITESPACE
        COMMAND_ERROR_IS_FATAL ANY)
    if (NOT XKV_LAPACK_LICENSE)
        message(FATAL_ERROR "package ${xkv_lapack_package} holds no LICENSE file, which has to go where its library goes: "
            "install another version of it, or pass -DXKV_LAPACK=system for the system's LAPACK")
    endif()
    target_link_libraries(llama PRIVATE "${XKV_LAPACK_FILE}")
    target_compile_definitions(llama PRIVATE XKV_LAPACK_SCIPY)
else()
    message(FATAL_ERROR "XKV_LAPACK is ${XKV_LAPACK}, expected pip or system")
endif()
