// Barriers, and what the lanes of a SIMD group do together.

#pragma once

#include "language.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

// places below 0: operations of a SIMD group
enum simd_place {
    SIMD_SUM     = -1,
    SIMD_MAX     = -2,
    SIMD_OR      = -3,
    SIMD_ANY     = -4,
    SIMD_XOR     = -5,
    SIMD_STORE   = -6,
    SIMD_MAC     = -7,
    SIMD_BARRIER = -8
};

template <typename T, typename F> static inline T simd_reduce(T x, int place, F && add) {
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(x));
    const uint64_t * list = xkv_shim::get().block.share(bits, place);
    T                res;
    memcpy(&res, &list[0], sizeof(res));
    for (int i = 1; i < fibers::n_lane; ++i) {
        T other;
        memcpy(&other, &list[i], sizeof(other));
        res = add(res, other);
    }
    return res;
}

static inline void simdgroup_barrier_unnamed() {
    xkv_shim::get().block.share(0, SIMD_BARRIER);
}

static inline float simd_sum(float x) {
    return simd_reduce(x, SIMD_SUM, [](float a, float b) { return a + b; });
}

static inline float simd_max(float x) {
    return simd_reduce(x, SIMD_MAX, [](float a, float b) { return max(a, b); });
}

static inline uint simd_or(uint x) {
    return simd_reduce(x, SIMD_OR, [](uint a, uint b) { return a | b; });
}

static inline bool simd_any(bool x) {
    return simd_reduce((int) x, SIMD_ANY, [](int a, int b) { return a | b; }) != 0;
}

static inline float simd_shuffle_xor(float x, ushort mask) {
    return xkv_shim::shuffle(x, xkv_shim::lane() ^ mask, SIMD_XOR);
}

// Matrices of 8 by 8, two elements in each lane. Which ones is open in Metal, so they are scattered here.
template <typename T, int Cols, int Rows> struct simdgroup_matrix {
    static_assert(Cols == 8 && Rows == 8 && sizeof(T) == 4, "a matrix of another kind");
    T own[2];
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

static inline int simd_element(int lane, int i) {
    return ((2 * lane + i) * 29 + 11) & 63;
}

// where all lanes' elements follow each other; 53 is the inverse of 29
static inline int simd_place_of(int element) {
    return (element + 64 - 11) * 53 & 63;
}

// as a load finds it, which faults can make wrong
static inline int simd_element_loaded(int i) {
    const xkv_shim::state & s = xkv_shim::get();
    return simd_element((xkv_shim::lane() + (s.faulty ? s.planted.lane : 0)) % fibers::n_lane, i);
}

template <typename T, int Cols, int Rows = Cols> static inline simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T x) {
    return { { x, x } };
}

// For pointers of each address space. Before a store, all lanes come to it, as before a product; to what is loaded a product follows.
#define XKV_SHIM_MATRIX_MEMORY(space)                                                                                                      \
    template <typename T>                                                                                                                  \
    static inline void simdgroup_load(simdgroup_matrix<T, 8, 8> & m, const space T * p, ulong ld = 8, ulong at = 0, bool flip = false) {   \
        for (int i = 0; i < 2; ++i) {                                                                                                      \
            const int e = simd_element_loaded(i);                                                                                          \
            m.own[i]    = flip ? p[at + e % 8 * ld + e / 8] : p[at + e / 8 * ld + e % 8];                                                  \
        }                                                                                                                                  \
    }                                                                                                                                      \
    template <typename T> static inline void simdgroup_store(simdgroup_matrix<T, 8, 8> m, space T * p, ulong ld = 8) {                     \
        xkv_shim::get().block.share(0, SIMD_STORE);                                                                                        \
        for (int i = 0; i < 2; ++i) {                                                                                                      \
            const int e           = simd_element(xkv_shim::lane(), i);                                                                     \
            p[e / 8 * ld + e % 8] = m.own[i];                                                                                              \
        }                                                                                                                                  \
    }

XKV_SHIM_MATRIX_MEMORY(device)
#if defined(XKV_SHIM_SPACES)
XKV_SHIM_MATRIX_MEMORY(threadgroup)
#endif

static inline void simdgroup_multiply_accumulate(simdgroup_float8x8 & d, const simdgroup_float8x8 & a, const simdgroup_float8x8 & b,
                                                 const simdgroup_float8x8 & c) {
    uint64_t x, y;
    memcpy(&x, a.own, sizeof(x));
    memcpy(&y, b.own, sizeof(y));
    const float * all   = (const float *) xkv_shim::get().block.share(x, SIMD_MAC, y);
    const float * other = all + 2 * fibers::n_lane;
    for (int i = 0; i < 2; ++i) {
        const int e   = simd_element(xkv_shim::lane(), i);
        float     sum = c.own[i];
        for (int r = 0; r < 8; ++r) {
            sum += all[simd_place_of(e / 8 * 8 + r)] * other[simd_place_of(8 * r + e % 8)];
        }
        d.own[i] = sum;
    }
}

} // namespace metal

#define XKV_SHIM_TEXT_(x) #x
#define XKV_SHIM_TEXT(x)  XKV_SHIM_TEXT_(x)
#define XKV_SHIM_NAME     __FILE__ ":" XKV_SHIM_TEXT(__LINE__)
#define XKV_SHIM_PLACE                                                                                                                     \
    [] {                                                                                                                                   \
        constexpr int place = xkv_shim::place(__FILE__, __LINE__);                                                                         \
        return place;                                                                                                                      \
    }()

#define threadgroup_barrier(flags) (xkv_shim::threadgroup_flags(flags), xkv_shim::barrier(XKV_SHIM_PLACE, XKV_SHIM_NAME))
#define simdgroup_barrier(flags)   (xkv_shim::threadgroup_flags(flags), xkv_shim::warp_barrier(XKV_SHIM_PLACE, XKV_SHIM_NAME))

namespace xkv_shim {

// a barrier that does not order threadgroup memory is none
static inline void threadgroup_flags(metal::mem_flags flags) {
    if (flags != metal::mem_flags::mem_threadgroup && get().error.empty()) {
        get().error = "a barrier that leaves threadgroup memory out";
    }
}

} // namespace xkv_shim
