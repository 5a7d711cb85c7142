#include "base/xkv-error.h"

#include <cstdarg>
#include <cstdio>

static thread_local std::string g_last_error;

void xkv_throw(xkv_status status, const char * fmt, ...) {
    char text[1024];

    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);

    throw xkv_error(status, text);
}

void xkv_set_last_error(const std::string & text) {
    g_last_error = text;
}

const char * xkv_last_error(void) {
    return g_last_error.c_str();
}
