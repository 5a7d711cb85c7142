// Types and functions of Metal. With XKV_SHIM_SPACES, for clang -fsyntax-only, pointers have the address spaces that they are declared
// with, and one that is forgotten or mixed up is an error.

#pragma once

#include "../blocks.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(XKV_SHIM_SPACES)
#    define device      __attribute__((address_space(1)))
#    define constant    const __attribute__((address_space(2)))
#    define threadgroup __attribute__((address_space(3)))
#    define XKV_GUARD(p)
#else
#    define device
#    define constant const
#    define threadgroup
#    define XKV_GUARD(p) xkv_shim::guard(p)
#endif
#define thread
#define kernel static

#define XKV_GUARD_BYTES 64
static_assert(XKV_GUARD_BYTES == xkv_shim::guard_bytes, "guard zones of another size");

#define XKV_MTL_AT(x)
#define XKV_MTL_CONSTANT(name, i) static const int & name = xkv_shim::constants()[i];
#define XKV_MTL_UNROLL
#define XKV_MTL_SIMD_ORDER() simdgroup_barrier_unnamed()

typedef unsigned char  uchar;
typedef unsigned short ushort;
typedef unsigned int   uint;
typedef unsigned long  ulong;

#if defined(__clang__)
typedef _Float16 half;
#else
struct half {
    uint16_t bits;

    operator float() const {
        const uint32_t sign = (uint32_t) (bits & 0x8000) << 16;
        const uint32_t exp  = (bits >> 10) & 31;
        const uint32_t mant = bits & 0x3ff;
        if (exp == 0) {
            const float x = (float) mant * 0x1p-24f;
            return sign ? -x : x;
        }
        const uint32_t all = sign | (exp == 31 ? 0x7f800000u : (exp + 112) << 23) | mant << 13;
        float          res;
        memcpy(&res, &all, sizeof(res));
        return res;
    }
};
#endif

// compilers' own vectors: elements are [i], and what would be a constructor is a macro of the same name
typedef float float2 __attribute__((vector_size(8)));
typedef float float4 __attribute__((vector_size(16)));
typedef uchar uchar4 __attribute__((vector_size(4)));
typedef uint  uint3 __attribute__((vector_size(16)));
typedef ulong ulong2 __attribute__((vector_size(16)));

namespace xkv_shim {

// function constants by their index, which a test sets
inline int * constants() {
    static int list[32];
    return list;
}

template <typename V, typename T> static inline std::enable_if_t<std::is_arithmetic<T>::value, V> make(T x) {
    return V{} + x;
}

template <typename V, typename T> static inline std::enable_if_t<!std::is_arithmetic<T>::value, V> make(T x) {
    return __builtin_convertvector(x, V);
}

template <typename V, typename... T> static inline std::enable_if_t<(sizeof...(T) > 1), V> make(T... x) {
    return V{ x... };
}

} // namespace xkv_shim

#define float2(...) xkv_shim::make<float2>(__VA_ARGS__)
#define float4(...) xkv_shim::make<float4>(__VA_ARGS__)

namespace metal {

template <typename To, typename From> static inline To as_type(From x) {
    static_assert(sizeof(To) == sizeof(From), "as_type of another size");
    To res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

template <typename T> static inline T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T> static inline T max(T a, T b) {
    return a < b ? b : a;
}

static inline float dot(float4 a, float4 b) {
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3];
}

static inline float exp(float x) {
    return std::exp(x);
}

static inline float log(float x) {
    return std::log(x);
}

namespace precise {

static inline float tanh(float x) {
    return std::tanh(x);
}

} // namespace precise

} // namespace metal
