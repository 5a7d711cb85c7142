// Tensor cores and numbers of 16 bits of CUDA, on the CPU.

#pragma once

#include "blocks.h"

#include <cmath>

namespace xkv_shim {

// what all lanes of a warp have in N registers, by lane
template <int N> struct of_lanes {
    uint32_t value[fibers::n_lane][N];

    of_lanes(const uint32_t (&x)[N], int place) {
        for (int i = 0; i < N; i += 2) {
            const uint64_t * list = get().block.share(x[i] | (uint64_t) x[i + 1] << 32, place);
            for (int k = 0; k < fibers::n_lane; ++k) {
                value[k][i]     = (uint32_t) list[k];
                value[k][i + 1] = (uint32_t) (list[k] >> 32);
            }
        }
    }
};

// c += a b by plain loops, with the registers where xkv-cu-mma.cuh has them; n of part() numbers in a register
template <int n, typename T, typename F>
static inline void mma(T (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int place, F && part) {
    const of_lanes<4> as(a, place);
    const of_lanes<2> bs(b, place);
    const int         l = lane() + (get().faulty ? get().planted.lane : 0);
    for (int i = 0; i < 4; ++i) {
        const int row = l / 4 % 8;
        const int col = l % 4 * 2 + i % 2;
        for (int half = 0; half < 2; ++half) {
            for (int j = 0; j < 4; ++j) {
                for (int k = 0; k < n; ++k) {
                    c[i] += part(as.value[row * 4 + j][half * 2 + i / 2], k) * part(bs.value[col * 4 + j][half], k);
                }
            }
        }
    }
}

static inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<4>(c, a, b, -9, [](uint32_t x, int k) { return (int) (int8_t) (x >> 8 * k); });
    c[0] += struck() ? get().planted.dot : 0;
}

static inline uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    const uint32_t sign = bits >> 16 & 0x8000;
    const float    size = std::fabs(x);
    if (!(size < 65520.0f)) {
        return (uint16_t) (sign | (size == size ? 0x7c00 : 0x7e00));
    }
    if (size < 0x1p-14f) {
        return (uint16_t) (sign | (uint32_t) std::nearbyint(size * 0x1p24f));
    }
    bits &= 0x7fffffff;
    bits += 0xfff + (bits >> 13 & 1);
    return (uint16_t) (sign | ((bits >> 13) - (112 << 10)));
}

static inline float make_float(uint16_t h) {
    const float size = (h & 0x7fff) >= 0x7c00 ? ((h & 0x3ff) ? NAN : INFINITY) :
                       (h & 0x7c00) == 0      ? (float) (h & 0x3ff) * 0x1p-24f :
                                                std::ldexp((float) ((h & 0x3ff) | 0x400), (h >> 10 & 31) - 25);
    return h & 0x8000 ? -size : size;
}

static inline float from_half(uint16_t h) {
    static const std::vector<float> all = [] {
        std::vector<float> res(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) {
            res[i] = make_float((uint16_t) i);
        }
        return res;
    }();
    return all[h];
}

static inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma<2>(c, a, b, -10, [](uint32_t x, int k) { return from_half((uint16_t) (x >> 16 * k)); });
}

} // namespace xkv_shim
