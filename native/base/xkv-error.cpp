#include "base/xkv-error.h"

#include <cstdarg>
#include <cstdio>
#include <new>

static thread_local char g_last_error[XKV_ERROR_SIZE];

void xkv_throw(xkv_status status, const char * fmt, ...) {
    char text[1024];

    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);

    throw xkv_error(status, text);
}

xkv_failure xkv_caught() noexcept {
    xkv_failure res = { XKV_STATUS_INTERNAL, "" };

    const auto put = [&](xkv_status status, const char * text) {
        res.status = status;
        snprintf(res.text, sizeof(res.text), "%s", text);
    };
    try {
        throw;
    } catch (const xkv_error & err) {
        put(err.status, err.what());
    } catch (const std::bad_alloc &) {
        put(XKV_STATUS_NO_MEMORY, "out of memory");
    } catch (const std::exception & err) {
        put(XKV_STATUS_INTERNAL, err.what());
    } catch (...) {
        put(XKV_STATUS_INTERNAL, "an unknown exception");
    }
    return res;
}

void xkv_set_last_error(const char * text) noexcept {
    snprintf(g_last_error, sizeof(g_last_error), "%s", text);
}

const char * xkv_last_error(void) {
    return g_last_error;
}
