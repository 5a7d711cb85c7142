// Products with tiles and tiles as f32.

#pragma once

#include "xkv-simd.h"

#include "../xkv-tiles.h"

// What tiles meet: numbers, and the same as bytes with a scale and a sum of codes per 32.
struct xkv_rounded {
    const float *   x;
    const int8_t *  codes;
    const float *   scales;
    const int32_t * sums;
};

// n numbers, a multiple of 32
static inline void xkv_round(const float * x, int64_t n, int8_t * codes, float * scales, int32_t * sums) {
    for (int64_t b = 0; b < n / 32; ++b) {
        const f32r x0   = xkv_load(x + 32 * b);
        const f32r x1   = xkv_load(x + 32 * b + 16);
        const f32r zero = {};

        const float max = xkv_max(xkv_max(xkv_max(x0, zero - x0), xkv_max(x1, zero - x1)));
        const float id  = max > 0.0f ? 127.0f / max : 0.0f;
        scales[b]       = max / 127.0f;
#if defined(__AVX512F__)
        const __m512i c0 = _mm512_cvtps_epi32((__m512) (x0 * id).v[0]);
        const __m512i c1 = _mm512_cvtps_epi32((__m512) (x1 * id).v[0]);
        const __m256i c  = _mm256_set_m128i(_mm512_cvtepi32_epi8(c1), _mm512_cvtepi32_epi8(c0));
        _mm256_storeu_si256((__m256i *) (codes + 32 * b), c);
        const __m256i s4 = _mm256_sad_epu8(_mm256_xor_si256(c, _mm256_set1_epi8((char) 0x80)), _mm256_setzero_si256());
        const __m128i s2 = _mm_add_epi64(_mm256_castsi256_si128(s4), _mm256_extracti128_si256(s4, 1));
        sums[b]          = _mm_cvtsi128_si32(_mm_add_epi64(s2, _mm_unpackhi_epi64(s2, s2))) - 32 * 128;
#elif defined(__AVX2__)
        const f32r    y0 = x0 * id;
        const f32r    y1 = x1 * id;
        const __m256i c0 = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256) y0.v[0]), _mm256_cvtps_epi32((__m256) y0.v[1]));
        const __m256i c1 = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256) y1.v[0]), _mm256_cvtps_epi32((__m256) y1.v[1]));
        const __m256i c  = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(c0, c1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *) (codes + 32 * b), c);
        const __m256i s4 = _mm256_madd_epi16(_mm256_add_epi16(c0, c1), _mm256_set1_epi16(1));
        __m128i       s  = _mm_add_epi32(_mm256_castsi256_si128(s4), _mm256_extracti128_si256(s4, 1));
        s                = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        sums[b]          = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
#else
        int32_t sum = 0;
        for (int i = 0; i < 32; ++i) {
            codes[32 * b + i] = (int8_t) rintf(x[32 * b + i] * id);
            sum += codes[32 * b + i];
        }
        sums[b] = sum;
#endif
    }
}

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

// res[m] += n columns of 16 rows times y[m], from tiles that follow each other; n is a multiple of the tile's columns
template <ggml_type T, int M> static inline void xkv_dot_tiles(const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
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

template <int M> static inline void xkv_dot_tiles(ggml_type type, const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
    switch (type) {
    case GGML_TYPE_Q8_0:
        xkv_dot_tiles<GGML_TYPE_Q8_0, M>(tiles, n, y, res);
        break;
    case GGML_TYPE_Q5_0:
        xkv_dot_tiles<GGML_TYPE_Q5_0, M>(tiles, n, y, res);
        break;
    case GGML_TYPE_Q4_0:
        xkv_dot_tiles<GGML_TYPE_Q4_0, M>(tiles, n, y, res);
        break;
    case GGML_TYPE_Q2_0:
        xkv_dot_tiles<GGML_TYPE_Q2_0, M>(tiles, n, y, res);
        break;
    case GGML_TYPE_Q1_0:
        xkv_dot_tiles<GGML_TYPE_Q1_0, M>(tiles, n, y, res);
        break;
    default:
        xkv_dot_tiles_float<M>(type, tiles, n, y, res);
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
static inline void xkv_dot_tiles(int m, ggml_type type, const uint8_t * tiles, int64_t n, const xkv_rounded * y, f32r * res) {
    switch (m) {
    case 1:
        xkv_dot_tiles<1>(type, tiles, n, y, res);
        break;
    case 2:
        xkv_dot_tiles<2>(type, tiles, n, y, res);
        break;
    case 3:
        xkv_dot_tiles<3>(type, tiles, n, y, res);
        break;
    case 4:
        xkv_dot_tiles<4>(type, tiles, n, y, res);
        break;
#if XKV_DOT_MAX > 4
    case 5:
        xkv_dot_tiles<5>(type, tiles, n, y, res);
        break;
    case 6:
        xkv_dot_tiles<6>(type, tiles, n, y, res);
        break;
    case 7:
        xkv_dot_tiles<7>(type, tiles, n, y, res);
        break;
    case 8:
        xkv_dot_tiles<8>(type, tiles, n, y, res);
        break;
    case 9:
        xkv_dot_tiles<9>(type, tiles, n, y, res);
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
