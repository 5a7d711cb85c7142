// 16 lanes in the compiler's vector extensions, and the few operations that need an instruction set by name.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#    include <immintrin.h>
#elif defined(__ARM_NEON)
#    include <arm_neon.h>
#endif

#include "ggml.h"

typedef float   f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint8_t u8x64  __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t u16x32 __attribute__((vector_size(64), aligned(1), may_alias));

// values in registers, as opposed to unaligned memory above
typedef float   f32r __attribute__((vector_size(64)));
typedef int32_t i32r __attribute__((vector_size(64)));

#define XKV_INLINE static inline __attribute__((always_inline))

XKV_INLINE f32r xkv_set1(float x) {
    return f32r{} + x;
}

XKV_INLINE f32r xkv_load(const float * p) {
    return (f32r) *(const f32x16 *) p;
}

XKV_INLINE void xkv_store(float * p, f32r x) {
    *(f32x16 *) p = (f32x16) x;
}

XKV_INLINE f32r xkv_to_float(i32r x) {
    return __builtin_convertvector(x, f32r);
}

XKV_INLINE float xkv_f16(const void * p) {
    ggml_fp16_t h;
    memcpy(&h, p, sizeof(h));
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    return ggml_fp16_to_fp32(h);
#endif
}

// 16 signed bytes
XKV_INLINE f32r xkv_load_i8(const void * p) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    i8x16 x;
    memcpy(&x, p, 16);
    return __builtin_convertvector(x, f32r);
}

XKV_INLINE f32r xkv_max(f32r a, f32r b) {
#if defined(__AVX512F__)
    return (f32r) _mm512_max_ps((__m512) a, (__m512) b);
#else
    return a > b ? a : b;
#endif
}

XKV_INLINE float xkv_sum(f32r x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) x);
#else
    float s = 0.0f;
    for (int i = 0; i < 16; ++i) {
        s += x[i];
    }
    return s;
#endif
}

XKV_INLINE float xkv_max(f32r x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512) x);
#else
    float m = x[0];
    for (int i = 1; i < 16; ++i) {
        m = x[i] > m ? x[i] : m;
    }
    return m;
#endif
}

// 16 halves
XKV_INLINE f32r xkv_load_f16(const void * p) {
#if defined(__AVX512F__)
    return (f32r) _mm512_maskz_cvtph_ps((__mmask16) -1, _mm256_loadu_si256((const __m256i *) p));
#elif defined(__F16C__)
    f32r res;
    const __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p));
    const __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p + 1));
    memcpy(&res, &lo, 32);
    memcpy((char *) &res + 32, &hi, 32);
    return res;
#elif defined(__ARM_NEON) && defined(__aarch64__)
    f32r res;
    for (int i = 0; i < 4; ++i) {
        const float32x4_t x = vcvt_f32_f16(vld1_f16((const __fp16 *) p + 4*i));
        memcpy((char *) &res + 16*i, &x, 16);
    }
    return res;
#else
    f32r res;
    ggml_fp16_t h[16];
    memcpy(h, p, sizeof(h));
    for (int i = 0; i < 16; ++i) {
        res[i] = ggml_fp16_to_fp32(h[i]);
    }
    return res;
#endif
}

// e^x to about 2 units in the last place; 0 below -87
XKV_INLINE f32r xkv_exp(f32r x) {
    const f32r t = xkv_max(x, xkv_set1(-87.0f))*1.44269504f;
#if defined(__AVX512F__)
    const f32r n = (f32r) _mm512_roundscale_ps((__m512) t, _MM_FROUND_TO_NEAREST_INT);
#else
    const f32r magic = xkv_set1(12582912.0f); // 1.5*2^23: rounds to an integer
    const f32r n     = (t + magic) - magic;
#endif
    const f32r r = t - n;
    f32r p = xkv_set1(1.535336188319500e-4f);
    p = p*r + 1.339887440266574e-3f;
    p = p*r + 9.618437357674640e-3f;
    p = p*r + 5.550332471162809e-2f;
    p = p*r + 2.402264791363012e-1f;
    p = p*r + 6.931472028550421e-1f;
    p = p*r + 1.0f;
#if defined(__AVX512F__)
    return (f32r) _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask((__m512) x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ), (__m512) p, (__m512) n);
#else
    const i32r e = (__builtin_convertvector(n, i32r) + 127) << 23;
    const f32r s = p*(f32r) e;
    return x >= -87.0f ? s : f32r{};
#endif
}

//
// sums of 4 products of bytes in each lane
//

// codes of 8 bits are met as unsigned where the instruction set allows, else with 128 taken off first
#if defined(__AVX512VNNI__)
#    define XKV_Q8_OFFSET 128
#elif defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
#    define XKV_Q8_OFFSET 0
#else
#    define XKV_Q8_OFFSET 128
#endif

// acc += sum over 4 of x (unsigned, below 32, or any byte when WIDE) times y
template <bool WIDE> XKV_INLINE i32r xkv_dot4(i32r acc, u8x64 x, const int8_t * y) {
    int32_t w;
    memcpy(&w, y, 4);
#if defined(__AVX512VNNI__)
    return (i32r) _mm512_dpbusd_epi32((__m512i) acc, (__m512i) x, _mm512_set1_epi32(w));
#elif defined(__AVX2__)
    const __m256i yv   = _mm256_set1_epi32(w);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a[2];
    __m256i v[2];
    memcpy(a, &acc, 64);
    memcpy(v, &x, 64);
    for (int i = 0; i < 2; ++i) {
        __m256i u = v[i];
        __m256i s = yv;
        if (WIDE) {
            u = _mm256_xor_si256(u, _mm256_set1_epi8((char) 0x80));
            s = _mm256_sign_epi8(yv, u);
            u = _mm256_abs_epi8(u);
        }
        GGML_UNUSED(ones);
#    if defined(__AVXVNNI__)
        a[i] = _mm256_dpbusd_avx_epi32(a[i], u, s);
#    else
        a[i] = _mm256_add_epi32(a[i], _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), ones));
#    endif
    }
    memcpy(&acc, a, 64);
    return acc;
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t yv = vreinterpretq_s8_s32(vdupq_n_s32(w));
    int32x4_t a[4];
    int8x16_t v[4];
    memcpy(a, &acc, 64);
    memcpy(v, &x, 64);
    for (int i = 0; i < 4; ++i) {
        a[i] = vdotq_s32(a[i], WIDE ? veorq_s8(v[i], vdupq_n_s8((int8_t) 0x80)) : v[i], yv);
    }
    memcpy(&acc, a, 64);
    return acc;
#else
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 4; ++j) {
            acc[i] += (int32_t) x[4*i + j]*y[j];
        }
    }
    GGML_UNUSED(w);
    return acc;
#endif
}
