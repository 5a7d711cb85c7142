// Products with tiles and tiles as f32.

#pragma once

#include "xkv-round.h"

#include "../xkv-tiles.h"

template <ggml_type T> struct xkv_tile;

template <> struct xkv_tile<GGML_TYPE_Q8_0> {
    static constexpr int            cols = 32, offset = XKV_Q8_OFFSET, bytes = 32 + 512;
    static constexpr bool           wide = true;
    template <int K> XKV_INLINE u8r group(const uint8_t * codes) { return xkv_get<uint8_t>(codes + 64 * K); }
};

XKV_INLINE u8r xkv_bits(const uint8_t * p, int shift, uint8_t mask) {
    return xkv_as<uint8_t>(xkv_get<uint16_t>(p) >> shift) & xkv_same(mask);
}

template <> struct xkv_tile<GGML_TYPE_Q4_0> {
    static constexpr int            cols = 32, offset = 8, bytes = 32 + 256;
    static constexpr bool           wide = false;
    template <int K> XKV_INLINE u8r group(const uint8_t * codes) { return xkv_bits(codes + 64 * (K / 2), 4 * (K % 2), 15); }
};

template <> struct xkv_tile<GGML_TYPE_Q5_0> {
    static constexpr int            cols = 32, offset = 16, bytes = 32 + 320;
    static constexpr bool           wide = false;
    template <int K> XKV_INLINE u8r group(const uint8_t * codes) {
        const u16r hi = xkv_get<uint16_t>(codes + 256);
        const u8r  h  = xkv_as<uint8_t>(K < 4 ? hi << (4 - K) : hi >> (K - 4)) & xkv_same((uint8_t) 16);
        return xkv_bits(codes + 64 * (K / 2), 4 * (K % 2), 15) | h;
    }
};

template <> struct xkv_tile<GGML_TYPE_Q2_0> {
    static constexpr int            cols = 64, offset = 1, bytes = 32 + 256;
    static constexpr bool           wide = false;
    template <int K> XKV_INLINE u8r group(const uint8_t * codes) { return xkv_bits(codes + 64 * (K / 4), 2 * (K % 4), 3); }
};

// +-d is d times a code of 0 or 2 less 1
template <> struct xkv_tile<GGML_TYPE_Q1_0> {
    static constexpr int            cols = 128, offset = 1, bytes = 32 + 256;
    static constexpr bool           wide = false;
    template <int K> XKV_INLINE u8r group(const uint8_t * codes) {
        const u16r v = xkv_get<uint16_t>(codes + 64 * (K / 8));
        return xkv_as<uint8_t>(K % 8 == 0 ? v << 1 : v >> (K % 8 > 0 ? K % 8 - 1 : 0)) & xkv_same((uint8_t) 2);
    }
};

// groups K0 .. K1 - 1 of a tile, of M numbers each
template <ggml_type T, int K0, int K1, int M> XKV_INLINE void xkv_dot_groups(const uint8_t * codes, const int8_t * const * y, i32r * acc) {
    if constexpr (K0 < K1) {
        const u8r x = xkv_tile<T>::template group<K0>(codes);
        for (int m = 0; m < M; ++m) {
            xkv_dot4<xkv_tile<T>::wide>(acc[m], x, y[m] + 4 * K0);
        }
        xkv_dot_groups<T, K0 + 1, K1, M>(codes, y, acc);
    }
}

#if XKV_SUM_16
template <ggml_type T, int K0, int K1, int M>
XKV_INLINE void xkv_dot_groups_16(const uint8_t * codes, const int8_t * const * y, i16r * acc) {
    if constexpr (K0 < K1) {
        const u8r x = xkv_tile<T>::template group<K0>(codes);
        for (int m = 0; m < M; ++m) {
            xkv_dot2(acc[m], x, y[m] + 4 * K0);
        }
        xkv_dot_groups_16<T, K0 + 1, K1, M>(codes, y, acc);
    }
}

// N groups, as many as 16 bits hold sums of: 2*127*N times the largest code
template <ggml_type T, int K0, int N, int M>
XKV_INLINE void xkv_dot_groups_16_to_32(const uint8_t * codes, const int8_t * const * y, i32r * acc) {
    i16r part[M] = {};
    xkv_dot_groups_16<T, K0, K0 + N, M>(codes, y, part);
    for (int m = 0; m < M; ++m) {
        xkv_add_16(acc[m], part[m]);
    }
}
#endif

// 32 columns of one tile, the B-th of it
template <ggml_type T, int B, int M>
XKV_INLINE void xkv_dot_32(const uint8_t * codes, const f32r & scale, const int8_t * const * y, const float * ys, const int32_t * sums,
                           f32r * res) {
    i32r acc[M];
    for (int m = 0; m < M; ++m) {
        acc[m] = xkv_same((int32_t) -xkv_tile<T>::offset * sums[m]);
    }
#if XKV_SUM_16
    if constexpr (T == GGML_TYPE_Q5_0) {
        xkv_dot_groups_16_to_32<T, 8 * B, 4, M>(codes, y, acc);
        xkv_dot_groups_16_to_32<T, 8 * B + 4, 4, M>(codes, y, acc);
    } else if constexpr (!xkv_tile<T>::wide) {
        xkv_dot_groups_16_to_32<T, 8 * B, 8, M>(codes, y, acc);
    } else
#endif
        xkv_dot_groups<T, 8 * B, 8 * B + 8, M>(codes, y, acc);
    for (int m = 0; m < M; ++m) {
        res[m] += xkv_to_float(acc[m]) * (scale * ys[m]);
    }
}

template <ggml_type T, int M> static inline void xkv_dot_coded_tiles(const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
    using tile = xkv_tile<T>;
    for (int64_t c = 0; c < n; c += tile::cols, tiles += tile::bytes) {
        const f32r scale = xkv_load_f16(tiles);

        const int8_t * yc[M];
        float          ys[M];
        int32_t        sums[M];
        for (int m = 0; m < M; ++m) {
            yc[m] = y[m].codes + c;
        }
        const auto take = [&](int b) {
            for (int m = 0; m < M; ++m) {
                ys[m]   = y[m].scales[c / 32 + b];
                sums[m] = y[m].sums[c / 32 + b];
            }
        };
        take(0);
        xkv_dot_32<T, 0, M>(tiles + 32, scale, yc, ys, sums, res);
        if constexpr (tile::cols >= 64) {
            take(1);
            xkv_dot_32<T, 1, M>(tiles + 32, scale, yc, ys, sums, res);
        }
        if constexpr (tile::cols >= 128) {
            take(2);
            xkv_dot_32<T, 2, M>(tiles + 32, scale, yc, ys, sums, res);
            take(3);
            xkv_dot_32<T, 3, M>(tiles + 32, scale, yc, ys, sums, res);
        }
    }
}

template <int M>
static inline void xkv_dot_tiles_float(ggml_type type, const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
    for (int64_t c = 0; c < n; ++c) {
        const f32r x = type == GGML_TYPE_F32 ? xkv_load((const float *) tiles + 16 * c) : xkv_load_f16(tiles + 32 * c);
        for (int m = 0; m < M; ++m) {
            res[m] += x * y[m].x[c];
        }
    }
}

// res[m] += n columns of 16 rows times y[m], from tiles that follow each other; n is a multiple of the tile's columns
template <ggml_type T, int M> static inline void xkv_dot_tiles(const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
    if constexpr (T == GGML_TYPE_F32 || T == GGML_TYPE_F16) {
        for (int64_t c = 0; c < n; ++c) {
            const f32r x = T == GGML_TYPE_F32 ? xkv_load((const float *) tiles + 16 * c) : xkv_load_f16(tiles + 32 * c);
            for (int m = 0; m < M; ++m) {
                res[m] += x * y[m].x[c];
            }
        }
    } else {
        xkv_dot_coded_tiles<T, M>(tiles, n, y, res);
    }
}

// blocks of 16 rows, whose tiles begin `stride` bytes apart
struct xkv_blocks {
    const uint8_t * tiles;
    size_t          stride;
    int64_t         n;
};

// dst[m][16*b + row] += n columns of the row in block b times y[m]
template <ggml_type T, int M>
static inline void xkv_dot_blocks(const xkv_blocks & x, int64_t n, const xkv_rounded * y, float * const * dst) {
    for (int64_t b = 0; b < x.n; ++b) {
        f32r res[M];
        for (int m = 0; m < M; ++m) {
            res[m] = xkv_load(dst[m] + 16 * b);
        }
        xkv_dot_tiles<T, M>(x.tiles + b * x.stride, n, y, res);
        for (int m = 0; m < M; ++m) {
            xkv_store(dst[m] + 16 * b, res[m]);
        }
    }
}

template <int M>
static inline void xkv_dot_blocks(ggml_type type, const xkv_blocks & x, int64_t n, const xkv_rounded * y, float * const * dst) {
    switch (type) {
    case GGML_TYPE_Q8_0:
        xkv_dot_blocks<GGML_TYPE_Q8_0, M>(x, n, y, dst);
        break;
    case GGML_TYPE_Q5_0:
        xkv_dot_blocks<GGML_TYPE_Q5_0, M>(x, n, y, dst);
        break;
    case GGML_TYPE_Q4_0:
        xkv_dot_blocks<GGML_TYPE_Q4_0, M>(x, n, y, dst);
        break;
    case GGML_TYPE_Q2_0:
        xkv_dot_blocks<GGML_TYPE_Q2_0, M>(x, n, y, dst);
        break;
    case GGML_TYPE_Q1_0:
        xkv_dot_blocks<GGML_TYPE_Q1_0, M>(x, n, y, dst);
        break;
    case GGML_TYPE_F16:
        xkv_dot_blocks<GGML_TYPE_F16, M>(x, n, y, dst);
        break;
    default:
        xkv_dot_blocks<GGML_TYPE_F32, M>(x, n, y, dst);
        break;
    }
}

// most sums that stay in registers
#if defined(__AVX512F__)
#    define XKV_DOT_MAX 9
#else
#    define XKV_DOT_MAX 4
#endif

// the same for any number up to XKV_DOT_MAX
static inline void xkv_dot_blocks(int m, ggml_type type, const xkv_blocks & x, int64_t n, const xkv_rounded * y, float * const * dst) {
    switch (m) {
    case 1:
        xkv_dot_blocks<1>(type, x, n, y, dst);
        break;
    case 2:
        xkv_dot_blocks<2>(type, x, n, y, dst);
        break;
    case 3:
        xkv_dot_blocks<3>(type, x, n, y, dst);
        break;
    case 4:
        xkv_dot_blocks<4>(type, x, n, y, dst);
        break;
#if XKV_DOT_MAX > 4
    case 5:
        xkv_dot_blocks<5>(type, x, n, y, dst);
        break;
    case 6:
        xkv_dot_blocks<6>(type, x, n, y, dst);
        break;
    case 7:
        xkv_dot_blocks<7>(type, x, n, y, dst);
        break;
    case 8:
        xkv_dot_blocks<8>(type, x, n, y, dst);
        break;
    case 9:
        xkv_dot_blocks<9>(type, x, n, y, dst);
        break;
#endif
    }
}

//
// tiles as f32: column c of 16 rows at dst + c*stride
//

template <ggml_type T, int K> XKV_INLINE void xkv_expand_groups(const uint8_t * codes, const f32r & scale, float * dst, int64_t stride) {
    if constexpr (K < xkv_tile<T>::cols / 4) {
        const i32r w = xkv_as<int32_t>(xkv_tile<T>::template group<K>(codes));
        for (int j = 0; j < 4; ++j) {
            const i32r c = ((w >> (8 * j)) & 255) - (int32_t) (T == GGML_TYPE_Q8_0 ? 128 : xkv_tile<T>::offset);
            xkv_store(dst + (4 * K + j) * stride, xkv_to_float(c) * scale);
        }
        xkv_expand_groups<T, K + 1>(codes, scale, dst, stride);
    }
}

template <ggml_type T> static inline void xkv_expand_tile(const uint8_t * tile, float * dst, int64_t stride) {
    xkv_expand_groups<T, 0>(tile + 32, xkv_load_f16(tile), dst, stride);
}

static inline void xkv_expand_tile(ggml_type type, const uint8_t * tile, float * dst, int64_t stride) {
    switch (type) {
    case GGML_TYPE_Q8_0:
        xkv_expand_tile<GGML_TYPE_Q8_0>(tile, dst, stride);
        break;
    case GGML_TYPE_Q5_0:
        xkv_expand_tile<GGML_TYPE_Q5_0>(tile, dst, stride);
        break;
    case GGML_TYPE_Q4_0:
        xkv_expand_tile<GGML_TYPE_Q4_0>(tile, dst, stride);
        break;
    case GGML_TYPE_Q2_0:
        xkv_expand_tile<GGML_TYPE_Q2_0>(tile, dst, stride);
        break;
    case GGML_TYPE_Q1_0:
        xkv_expand_tile<GGML_TYPE_Q1_0>(tile, dst, stride);
        break;
    default:
        for (int c = 0; c < 16; ++c) {
            xkv_store(dst + c * stride, type == GGML_TYPE_F32 ? xkv_load((const float *) tile + 16 * c) : xkv_load_f16(tile + 32 * c));
        }
        break;
    }
}

//
// f32 panels: c[m][0 .. 16*NV) += sum over k of a[m][k] times row k of b
//

#if defined(__AVX512F__)
#    define XKV_MUL_ROWS 6
#    define XKV_MUL_VECS 4
#else
#    define XKV_MUL_ROWS 6
#    define XKV_MUL_VECS 1 // of 16 numbers
#endif

template <int M, int NV> XKV_INLINE void xkv_mul_panel(int64_t n, const float * const * a, const float * b, int64_t ldb, f32r (*acc)[NV]) {
    for (int64_t k = 0; k < n; ++k) {
        f32r bv[NV];
        for (int v = 0; v < NV; ++v) {
            bv[v] = xkv_load(b + k * ldb + 16 * v);
        }
        for (int m = 0; m < M; ++m) {
            const f32r av = xkv_set1(a[m][k]);
            for (int v = 0; v < NV; ++v) {
                acc[m][v] += av * bv[v];
            }
        }
    }
}
