#pragma once

#include "xkv.h"

#include <cstddef>
#include <stdexcept>
#include <string>

// An error with a status of the C API. Thrown inside the library only: the C API turns it into a code and a text.
struct xkv_error : std::runtime_error {
    xkv_error(xkv_status status, const std::string & text) : std::runtime_error(text), status(status) {}

    const xkv_status status;
};

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
[[noreturn]] void
xkv_throw(xkv_status status, const char * fmt, ...);

// What went wrong, without memory of its own: it has to be told where memory has run out, too.
static const size_t XKV_ERROR_SIZE = 1024;

struct xkv_failure {
    xkv_status status;
    char       text[XKV_ERROR_SIZE];
};

// of the exception that is being handled
xkv_failure xkv_caught() noexcept;

// keeps the text for xkv_last_error() of this thread
void xkv_set_last_error(const char * text) noexcept;
