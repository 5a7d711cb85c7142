// Reductions of several vectors at once, and numbers rounded to bytes.

#pragma once

#include "xkv-simd.h"

// sums and largest numbers of four vectors; trees of shuffles that the four share take a third of what one after the other does
#if defined(__AVX512F__)
#    define XKV_REDUCE_4(op)                                                                                                               \
        const __m512  a0 = (__m512) x[0].v[0], a1 = (__m512) x[1].v[0], a2 = (__m512) x[2].v[0], a3 = (__m512) x[3].v[0];                  \
        const __m512  t0 = _mm512_##op##_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));                                       \
        const __m512  t1 = _mm512_##op##_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));                                       \
        const __m512d u0 = _mm512_castps_pd(t0), u1 = _mm512_castps_pd(t1);                                                                \
        const __m512  u = _mm512_##op##_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u0, u1)), _mm512_castpd_ps(_mm512_unpackhi_pd(u0, u1)));    \
        const __m256  w = _mm256_##op##_ps(_mm512_castps512_ps256(u), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(u), 1)));   \
        _mm_storeu_ps(res, _mm_##op##_ps(_mm256_castps256_ps128(w), _mm256_extractf128_ps(w, 1)))

XKV_INLINE void xkv_sum_4(const f32r * x, float * res) {
    XKV_REDUCE_4(add);
}

XKV_INLINE void xkv_max_4(const f32r * x, float * res) {
    XKV_REDUCE_4(max);
}
#    undef XKV_REDUCE_4
#else
XKV_INLINE void xkv_sum_4(const f32r * x, float * res) {
    for (int i = 0; i < 4; ++i) {
        res[i] = xkv_sum(x[i]);
    }
}

XKV_INLINE void xkv_max_4(const f32r * x, float * res) {
    for (int i = 0; i < 4; ++i) {
        res[i] = xkv_max(x[i]);
    }
}
#endif

XKV_INLINE f32r xkv_abs(const f32r & x) {
    return xkv_max(x, f32r() - x);
}

// What tiles meet: numbers, and the same as bytes with a scale and a sum of codes per 32.
struct xkv_rounded {
    const float *   x;
    const int8_t *  codes;
    const float *   scales;
    const int32_t * sums;
};

struct xkv_round_dst {
    int8_t *  codes;
    float *   scales;
    int32_t * sums;
};

// the 32 numbers of a block
static inline void xkv_round(const float * x, const xkv_round_dst & dst, int64_t block) {
    const f32r x0 = xkv_load(x + 32 * block);
    const f32r x1 = xkv_load(x + 32 * block + 16);

    const float max   = xkv_max(xkv_max(xkv_abs(x0), xkv_abs(x1)));
    const float id    = max > 0.0f ? 127.0f / max : 0.0f;
    int8_t *    codes = dst.codes + 32 * block;
    dst.scales[block] = max / 127.0f;
#if defined(__AVX512F__)
    const __m512i c0 = _mm512_cvtps_epi32((__m512) (x0 * id).v[0]);
    const __m512i c1 = _mm512_cvtps_epi32((__m512) (x1 * id).v[0]);
    const __m256i c  = _mm256_set_m128i(_mm512_cvtepi32_epi8(c1), _mm512_cvtepi32_epi8(c0));
    _mm256_storeu_si256((__m256i *) codes, c);
    const __m256i s4 = _mm256_sad_epu8(_mm256_xor_si256(c, _mm256_set1_epi8((char) 0x80)), _mm256_setzero_si256());
    const __m128i s2 = _mm_add_epi64(_mm256_castsi256_si128(s4), _mm256_extracti128_si256(s4, 1));
    dst.sums[block]  = _mm_cvtsi128_si32(_mm_add_epi64(s2, _mm_unpackhi_epi64(s2, s2))) - 32 * 128;
#elif defined(__AVX2__)
    const f32r    y0 = x0 * id;
    const f32r    y1 = x1 * id;
    const __m256i c0 = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256) y0.v[0]), _mm256_cvtps_epi32((__m256) y0.v[1]));
    const __m256i c1 = _mm256_packs_epi32(_mm256_cvtps_epi32((__m256) y1.v[0]), _mm256_cvtps_epi32((__m256) y1.v[1]));
    const __m256i c  = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(c0, c1), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *) codes, c);
    const __m256i s4 = _mm256_madd_epi16(_mm256_add_epi16(c0, c1), _mm256_set1_epi16(1));
    __m128i       s  = _mm_add_epi32(_mm256_castsi256_si128(s4), _mm256_extracti128_si256(s4, 1));
    s                = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    dst.sums[block]  = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
#else
    int32_t sum = 0;
    for (int i = 0; i < 32; ++i) {
        codes[i] = (int8_t) rintf(x[32 * block + i] * id);
        sum += codes[i];
    }
    dst.sums[block] = sum;
#endif
}

// four blocks, as one by one
static inline void xkv_round_4(const float * x, const xkv_round_dst & dst, const int64_t * blocks) {
#if defined(__AVX512BW__)
    f32r peak[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 x0 = _mm512_abs_ps(_mm512_loadu_ps(x + 32 * blocks[k]));
        const __m512 x1 = _mm512_abs_ps(_mm512_loadu_ps(x + 32 * blocks[k] + 16));
        peak[k].v[0]    = (f32r::reg) _mm512_max_ps(x0, x1);
    }
    float max[4];
    xkv_max_4(peak, max);
    const __m128 m = _mm_loadu_ps(max);
    float        scale[4];
    _mm_storeu_ps(scale, _mm_div_ps(m, _mm_set1_ps(127.0f)));
    const __m128 inverse = _mm_and_ps(_mm_div_ps(_mm_set1_ps(127.0f), m), _mm_cmp_ps(m, _mm_setzero_ps(), _CMP_GT_OQ));
    float        id[4];
    _mm_storeu_ps(id, inverse);

    __m512i sum[2];
    for (int h = 0; h < 2; ++h) {
        __m512i c[2];
        for (int k = 0; k < 2; ++k) {
            const float * y = x + 32 * blocks[2 * h + k];
            const __m512  d = _mm512_set1_ps(id[2 * h + k]);
            c[k]            = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(y), d)),
                                                 _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(y + 16), d)));
        }
        const __m512i codes = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
                                                       _mm512_packs_epi16(c[0], c[1]));
        _mm256_storeu_si256((__m256i *) (dst.codes + 32 * blocks[2 * h]), _mm512_castsi512_si256(codes));
        _mm256_storeu_si256((__m256i *) (dst.codes + 32 * blocks[2 * h + 1]), _mm512_extracti64x4_epi64(codes, 1));
        sum[h] = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_set1_epi8(1), codes), _mm512_set1_epi16(1));
    }
    // in each quarter, sums of blocks 0 and 2 in the first two, of 1 and 3 in the last two
    __m512i s         = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[0], sum[1]), _mm512_unpackhi_epi32(sum[0], sum[1]));
    s                 = _mm512_add_epi32(s, _mm512_shuffle_epi32(s, _MM_PERM_BADC));
    const __m256i s01 = _mm512_castsi512_si256(s);
    const __m256i s23 = _mm512_extracti64x4_epi64(s, 1);
    const __m128i s02 = _mm_add_epi32(_mm256_castsi256_si128(s01), _mm256_extracti128_si256(s01, 1));
    const __m128i s13 = _mm_add_epi32(_mm256_castsi256_si128(s23), _mm256_extracti128_si256(s23, 1));
    int32_t       all[4];
    _mm_storeu_si128((__m128i *) all, _mm_unpacklo_epi32(s02, s13));
    for (int k = 0; k < 4; ++k) {
        dst.scales[blocks[k]] = scale[k];
        dst.sums[blocks[k]]   = all[k];
    }
#else
    for (int k = 0; k < 4; ++k) {
        xkv_round(x, dst, blocks[k]);
    }
#endif
}
