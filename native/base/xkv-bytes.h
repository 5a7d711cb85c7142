#pragma once

#include "base/xkv-error.h"

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// Numbers and lists of numbers, one after the other.
class xkv_bytes_out {
public:
    std::vector<uint8_t> data;

    template <typename T> void put(const T & x) {
        static_assert(std::is_trivially_copyable<T>::value, "bytes of numbers only");
        const auto * p = (const uint8_t *) &x;
        data.insert(data.end(), p, p + sizeof(T));
    }

    template <typename T> void put_list(const std::vector<T> & list) {
        put((uint64_t) list.size());
        const auto * p = (const uint8_t *) list.data();
        data.insert(data.end(), p, p + list.size() * sizeof(T));
    }

    // room for n bytes that the caller writes
    uint8_t * more(size_t n) {
        data.resize(data.size() + n);
        return data.data() + data.size() - n;
    }
};

// The same read back; throws xkv_error where they end too early.
class xkv_bytes_in {
public:
    xkv_bytes_in(const uint8_t * data, size_t size) : at(data), left(size) {}

    const uint8_t * take(size_t n) {
        if (n > left) {
            xkv_throw(XKV_STATUS_FORMAT, "a saved state ends %zu bytes too early", n - left);
        }
        const uint8_t * res = at;
        at += n;
        left -= n;
        return res;
    }

    template <typename T> T get() {
        T res;
        memcpy(&res, take(sizeof(T)), sizeof(T));
        return res;
    }

    template <typename T> std::vector<T> get_list() {
        const auto n = get<uint64_t>();
        if (n > left / sizeof(T)) {
            xkv_throw(XKV_STATUS_FORMAT, "a saved state has a list of %llu numbers in %zu bytes", (unsigned long long) n, left);
        }
        std::vector<T> res(n);
        if (n > 0) {
            memcpy(res.data(), take(n * sizeof(T)), n * sizeof(T));
        }
        return res;
    }

    size_t rest() const { return left; }

private:
    const uint8_t * at;
    size_t          left;
};

// FNV-1a
static inline uint64_t xkv_hash(const void * data, size_t n, uint64_t hash = 0xcbf29ce484222325ull) {
    for (size_t i = 0; i < n; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i]) * 0x100000001b3ull;
    }
    return hash;
}
