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

#define XKV_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#    define XKV_LANE_BYTES 64
#elif defined(__AVX__)
#    define XKV_LANE_BYTES 32
#else
#    define XKV_LANE_BYTES 16
#endif

// 64 bytes in registers as wide as the instruction set has: compilers keep wider vectors of theirs in memory
template <typename T> struct xkv_wide {
    typedef T reg __attribute__((vector_size(XKV_LANE_BYTES)));

    static constexpr int n = 64 / XKV_LANE_BYTES;

    reg v[n];

    inline __attribute__((always_inline)) T operator[](int i) const {
        constexpr int each = XKV_LANE_BYTES / (int) sizeof(T);
        return v[i / each][i % each];
    }
};

typedef xkv_wide<float>    f32r;
typedef xkv_wide<int32_t>  i32r;
typedef xkv_wide<uint8_t>  u8r;
typedef xkv_wide<uint16_t> u16r;

#define XKV_WIDE_OP(op)                                                                                                                    \
    template <typename T> XKV_INLINE xkv_wide<T> operator op(const xkv_wide<T> & a, const xkv_wide<T> & b) {                               \
        xkv_wide<T> res;                                                                                                                   \
        for (int i = 0; i < xkv_wide<T>::n; ++i) {                                                                                         \
            res.v[i] = a.v[i] op b.v[i];                                                                                                   \
        }                                                                                                                                  \
        return res;                                                                                                                        \
    }                                                                                                                                      \
    template <typename T> XKV_INLINE xkv_wide<T> operator op(const xkv_wide<T> & a, T b) {                                                 \
        xkv_wide<T> res;                                                                                                                   \
        for (int i = 0; i < xkv_wide<T>::n; ++i) {                                                                                         \
            res.v[i] = a.v[i] op b;                                                                                                        \
        }                                                                                                                                  \
        return res;                                                                                                                        \
    }
XKV_WIDE_OP(+)
XKV_WIDE_OP(-)
XKV_WIDE_OP(*)
XKV_WIDE_OP(/)
XKV_WIDE_OP(&)
XKV_WIDE_OP(|)
#undef XKV_WIDE_OP

template <typename T> XKV_INLINE xkv_wide<T> & operator+=(xkv_wide<T> & a, const xkv_wide<T> & b) {
    return a = a + b;
}

template <typename T> XKV_INLINE xkv_wide<T> operator<<(const xkv_wide<T> & a, int n) {
    xkv_wide<T> res;
    for (int i = 0; i < xkv_wide<T>::n; ++i) {
        res.v[i] = a.v[i] << n;
    }
    return res;
}

template <typename T> XKV_INLINE xkv_wide<T> operator>>(const xkv_wide<T> & a, int n) {
    xkv_wide<T> res;
    for (int i = 0; i < xkv_wide<T>::n; ++i) {
        res.v[i] = a.v[i] >> n;
    }
    return res;
}

template <typename T> XKV_INLINE xkv_wide<T> xkv_same(T x) {
    xkv_wide<T> res;
    for (int i = 0; i < xkv_wide<T>::n; ++i) {
        res.v[i] = x - typename xkv_wide<T>::reg{}; // dropped by compilers, unlike zero plus a float
    }
    return res;
}

// the same bytes as other numbers
template <typename To, typename T> XKV_INLINE xkv_wide<To> xkv_as(const xkv_wide<T> & x) {
    xkv_wide<To> res;
    for (int i = 0; i < xkv_wide<T>::n; ++i) {
        res.v[i] = (typename xkv_wide<To>::reg) x.v[i];
    }
    return res;
}

// unaligned memory
template <typename T> XKV_INLINE xkv_wide<T> xkv_get(const void * p) {
    xkv_wide<T> res;
    for (int i = 0; i < xkv_wide<T>::n; ++i) {
        memcpy(&res.v[i], (const char *) p + i * XKV_LANE_BYTES, XKV_LANE_BYTES);
    }
    return res;
}

XKV_INLINE f32r xkv_set1(float x) {
    return xkv_same(x);
}

XKV_INLINE f32r xkv_load(const float * p) {
    return xkv_get<float>(p);
}

XKV_INLINE void xkv_store(float * p, const f32r & x) {
    for (int i = 0; i < f32r::n; ++i) {
        memcpy(p + i * XKV_LANE_BYTES / 4, &x.v[i], XKV_LANE_BYTES);
    }
}

XKV_INLINE f32r xkv_to_float(const i32r & x) {
    f32r res;
    for (int i = 0; i < f32r::n; ++i) {
        res.v[i] = __builtin_convertvector(x.v[i], f32r::reg);
    }
    return res;
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
    f32r res;
    for (int i = 0; i < f32r::n; ++i) {
#if defined(__AVX512F__)
        res.v[i] = (f32r::reg) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
#elif defined(__AVX2__)
        res.v[i] = (f32r::reg) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) ((const char *) p + 8 * i))));
#else
        typedef int8_t part __attribute__((vector_size(XKV_LANE_BYTES / 4)));
        part           x;
        memcpy(&x, (const char *) p + i * sizeof(x), sizeof(x));
        res.v[i] = __builtin_convertvector(x, f32r::reg);
#endif
    }
    return res;
}

// b where one of both is not a number
XKV_INLINE f32r xkv_max(const f32r & a, const f32r & b) {
    f32r res;
    for (int i = 0; i < f32r::n; ++i) {
#if defined(__AVX512F__)
        res.v[i] = (f32r::reg) _mm512_max_ps((__m512) a.v[i], (__m512) b.v[i]);
#elif defined(__AVX__)
        res.v[i] = (f32r::reg) _mm256_max_ps((__m256) a.v[i], (__m256) b.v[i]);
#else
        res.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
#endif
    }
    return res;
}

XKV_INLINE float xkv_sum(const f32r & x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512) x.v[0]);
#elif defined(__AVX__)
    const __m256 s = (__m256) (x.v[0] + x.v[1]);
    __m128       h = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    h              = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
    f32r::reg s = x.v[0];
    for (int i = 1; i < f32r::n; ++i) {
        s += x.v[i];
    }
    float res = 0.0f;
    for (int i = 0; i < XKV_LANE_BYTES / 4; ++i) {
        res += s[i];
    }
    return res;
#endif
}

XKV_INLINE float xkv_max(const f32r & x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512) x.v[0]);
#elif defined(__AVX__)
    const __m256 m = _mm256_max_ps((__m256) x.v[0], (__m256) x.v[1]);
    __m128       h = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    h              = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
#else
    f32r::reg m = x.v[0];
    for (int i = 1; i < f32r::n; ++i) {
        m = m > x.v[i] ? m : x.v[i];
    }
    float res = m[0];
    for (int i = 1; i < XKV_LANE_BYTES / 4; ++i) {
        res = m[i] > res ? m[i] : res;
    }
    return res;
#endif
}

// 16 halves
XKV_INLINE f32r xkv_load_f16(const void * p) {
    f32r res;
#if defined(__AVX512F__)
    res.v[0] = (f32r::reg) _mm512_maskz_cvtph_ps((__mmask16) -1, _mm256_loadu_si256((const __m256i *) p));
#elif defined(__F16C__)
    for (int i = 0; i < 2; ++i) {
        res.v[i] = (f32r::reg) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p + i));
    }
#elif defined(__ARM_NEON) && defined(__aarch64__)
    for (int i = 0; i < 4; ++i) {
        res.v[i] = (f32r::reg) vcvt_f32_f16(vld1_f16((const __fp16 *) p + 4 * i));
    }
#else
    float x[16];
    for (int i = 0; i < 16; ++i) {
        x[i] = xkv_f16((const char *) p + 2 * i);
    }
    res = xkv_load(x);
#endif
    return res;
}

// e^x to about 2 units in the last place; 0 below -87; what is not a number stays so
XKV_INLINE f32r xkv_exp(const f32r & x) {
    const f32r t = xkv_max(xkv_set1(-87.0f), x) * 1.44269504f;
#if defined(__AVX512F__)
    f32r n;
    n.v[0] = (f32r::reg) _mm512_roundscale_ps((__m512) t.v[0], _MM_FROUND_TO_NEAREST_INT);
#else
    const f32r n = (t + 12582912.0f) - 12582912.0f; // 1.5*2^23: rounds to an integer
#endif
    const f32r r = t - n;
    f32r       p = xkv_set1(1.535336188319500e-4f);
    p            = p * r + 1.339887440266574e-3f;
    p            = p * r + 9.618437357674640e-3f;
    p            = p * r + 5.550332471162809e-2f;
    p            = p * r + 2.402264791363012e-1f;
    p            = p * r + 6.931472028550421e-1f;
    p            = p * r + 1.0f;
    f32r res;
    for (int i = 0; i < f32r::n; ++i) {
#if defined(__AVX512F__)
        const __mmask16 in = _mm512_cmp_ps_mask((__m512) x.v[i], _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
        res.v[i]           = (f32r::reg) _mm512_maskz_scalef_ps(in, (__m512) p.v[i], (__m512) n.v[i]);
#else
        const i32r::reg e = (__builtin_convertvector(n.v[i], i32r::reg) + 127) << 23;
        res.v[i]          = x.v[i] < -87.0f ? f32r::reg{} : p.v[i] * (f32r::reg) e;
#endif
    }
    return res;
}

// log of positive normal numbers to 1e-6; of 0 it is below -87
XKV_INLINE f32r xkv_log(const f32r & x) {
    f32r res;
    for (int i = 0; i < f32r::n; ++i) {
        const i32r::reg bits = (i32r::reg) x.v[i] - 0x3f2aaaab; // mantissas from 2/3 to 4/3
        const i32r::reg e    = bits >> 23;
        const f32r::reg m    = (f32r::reg)((bits & 0x7fffff) + 0x3f2aaaab) - 1.0f;
        // of (1 + m), by z = m/(2 + m): 2 (z + z^3/3 + z^5/5 + ...), |z| <= 0.2
        const f32r::reg z = m / (m + 2.0f);
        const f32r::reg w = z * z;
        const f32r::reg p = ((w * (1.0f / 9) + 1.0f / 7) * w + 1.0f / 5) * w + 1.0f / 3;
        res.v[i]          = __builtin_convertvector(e, f32r::reg) * 0.693147181f + 2.0f * z * (1.0f + w * p);
    }
    return res;
}

// to 1e-7
XKV_INLINE f32r xkv_tanh(const f32r & x) {
    const f32r y = xkv_max(xkv_set1(-10.0f), xkv_max(xkv_set1(-10.0f), x) * -1.0f) * -2.0f;
    return xkv_set1(1.0f) - xkv_set1(2.0f) / (xkv_exp(y) + 1.0f);
}

//
// sums of 4 products of bytes in each lane
//

// codes of 8 bits are met as unsigned where the instruction set allows, else with 128 taken off first
#if defined(__AVX512VNNI__)
#    define XKV_Q8_OFFSET 128
#elif (defined(__AVX2__) && !defined(__AVX512F__)) || (defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8))
#    define XKV_Q8_OFFSET 0
#else
#    define XKV_Q8_OFFSET 128
#endif

// products that are first summed in 16 bits
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
#    define XKV_SUM_16 1
typedef xkv_wide<int16_t> i16r;

// acc += sums over 2 of x (unsigned) times y
XKV_INLINE void xkv_dot2(i16r & acc, const u8r & x, const int8_t * y) {
    int32_t w;
    memcpy(&w, y, 4);
    const __m256i yv = _mm256_set1_epi32(w);
    for (int i = 0; i < 2; ++i) {
        acc.v[i] += (i16r::reg) _mm256_maddubs_epi16((__m256i) x.v[i], yv);
    }
}

XKV_INLINE void xkv_add_16(i32r & acc, const i16r & x) {
    for (int i = 0; i < 2; ++i) {
        acc.v[i] += (i32r::reg) _mm256_madd_epi16((__m256i) x.v[i], _mm256_set1_epi16(1));
    }
}
#else
#    define XKV_SUM_16 0
#endif

// acc += sum over 4 of x (unsigned, below 32, or any byte when WIDE) times y
template <bool WIDE> XKV_INLINE void xkv_dot4(i32r & acc, const u8r & x, const int8_t * y) {
    int32_t w;
    memcpy(&w, y, 4);
#if defined(__AVX512VNNI__)
    acc.v[0] = (i32r::reg) _mm512_dpbusd_epi32((__m512i) acc.v[0], (__m512i) x.v[0], _mm512_set1_epi32(w));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i yv = _mm256_set1_epi32(w);
    for (int i = 0; i < 2; ++i) {
        __m256i u = (__m256i) x.v[i];
        __m256i s = yv;
        if (WIDE) {
            u = _mm256_xor_si256(u, _mm256_set1_epi8((char) 0x80));
            s = _mm256_sign_epi8(yv, u);
            u = _mm256_abs_epi8(u);
        }
#    if defined(__AVXVNNI__)
        acc.v[i] = (i32r::reg) _mm256_dpbusd_avx_epi32((__m256i) acc.v[i], u, s);
#    else
        acc.v[i] = (i32r::reg) _mm256_add_epi32((__m256i) acc.v[i], _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#    endif
    }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    const int8x16_t yv = vreinterpretq_s8_s32(vdupq_n_s32(w));
    for (int i = 0; i < 4; ++i) {
        acc.v[i] = (i32r::reg) vusdotq_s32((int32x4_t) acc.v[i], (uint8x16_t) x.v[i], yv);
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t yv = vreinterpretq_s8_s32(vdupq_n_s32(w));
    for (int i = 0; i < 4; ++i) {
        const int8x16_t u = (int8x16_t) x.v[i];
        acc.v[i]          = (i32r::reg) vdotq_s32((int32x4_t) acc.v[i], WIDE ? veorq_s8(u, vdupq_n_s8((int8_t) 0x80)) : u, yv);
    }
#else
    const u8r  mask = xkv_same((uint8_t) 255);
    const i32r xv   = xkv_as<int32_t>(x & mask);
    for (int j = 0; j < 4; ++j) {
        acc += ((xv >> 8 * j) & 255) * (int32_t) y[j];
    }
    GGML_UNUSED(w);
#endif
}
