#pragma once

#include "xkv.h"

#include "base/xkv-error.h"

// exceptions become codes, with their text in xkv_last_error()
template <typename F> int xkv_guard(F && f) {
    try {
        f();
        return XKV_STATUS_OK;
    } catch (...) {
        const auto failure = xkv_caught();
        xkv_set_last_error(failure.text);
        return failure.status;
    }
}

inline void xkv_require(const void * ptr, const char * name) {
    if (!ptr) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is NULL", name);
    }
}
