// Rows of any type as f32, and the ops by name.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "xkv-cpu-kernels.h"

#include "ggml-cpu.h"

#if defined(XKV_CPU_I8)

static inline __m256i xkv_load_nibbles(const uint8_t * qs) {
    const __m128i b = _mm_loadu_si128((const __m128i *) qs);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(b, 4), b), _mm256_set1_epi8(15));
}

// 32 bits as bytes 0 and 255
static inline __m256i xkv_load_bits(const uint8_t * bits) {
    uint32_t x;
    memcpy(&x, bits, sizeof(x));
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(x), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202,
                                                                                       0x0101010101010101, 0x0000000000000000));
    const __m256i bit    = _mm256_set1_epi64x(0x8040201008040201);
    return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

// codes of 32 numbers, the k-th 32 of a block, and what has to be taken off them

template <typename B> constexpr int xkv_off = 0;
template <> constexpr int xkv_off<block_q5_0> = 16;
template <> constexpr int xkv_off<block_q4_0> = 8;
template <> constexpr int xkv_off<block_q2_0> = 1;
template <> constexpr int xkv_off<block_q1_0> = 1;

static inline __m256i xkv_codes(const block_q8_0 & x, int) {
    return _mm256_loadu_si256((const __m256i *) x.qs);
}

static inline __m256i xkv_codes(const block_q5_0 & x, int) {
    return _mm256_or_si256(xkv_load_nibbles(x.qs), _mm256_and_si256(xkv_load_bits(x.qh), _mm256_set1_epi8(16)));
}

static inline __m256i xkv_codes(const block_q4_0 & x, int) {
    return xkv_load_nibbles(x.qs);
}

static inline __m256i xkv_codes(const block_q2_0 & x, int k) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (x.qs + 8*k)));
    const __m256i u = _mm256_or_si256(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)),
                                      _mm256_or_si256(_mm256_slli_epi32(b, 12), _mm256_slli_epi32(b, 18)));
    return _mm256_and_si256(u, _mm256_set1_epi8(3));
}

static inline __m256i xkv_codes(const block_q1_0 & x, int k) {
    return _mm256_and_si256(xkv_load_bits(x.qs + 4*k), _mm256_set1_epi8(2));
}

// f(32 codes, scale, what to take off, index of the first) for n numbers in blocks of QK
template <int QK, typename B, typename F> static inline void xkv_each_32(const char * src, int64_t n, F && f) {
    const B * x = (const B *) src;
    for (int64_t i = 0; i < n/QK; ++i) {
        for (int k = 0; k < QK/32; ++k) {
            f(xkv_codes(x[i], k), GGML_CPU_FP16_TO_FP32(x[i].d), xkv_off<B>, i*QK + 32*k);
        }
    }
}

template <typename F> static inline void xkv_each_32(ggml_type type, const char * src, int64_t n, F && f) {
    switch (type) {
        case GGML_TYPE_Q8_0: xkv_each_32<QK8_0, block_q8_0>(src, n, f); break;
        case GGML_TYPE_Q5_0: xkv_each_32<QK5_0, block_q5_0>(src, n, f); break;
        case GGML_TYPE_Q4_0: xkv_each_32<QK4_0, block_q4_0>(src, n, f); break;
        case GGML_TYPE_Q2_0: xkv_each_32<QK2_0, block_q2_0>(src, n, f); break;
        case GGML_TYPE_Q1_0: xkv_each_32<QK1_0, block_q1_0>(src, n, f); break;
        default: GGML_ABORT("type without codes");
    }
}

void xkv_cpu_to_i8(ggml_type type, const char * src, int8_t * codes, float * scales, float * offsets, int64_t n) {
    xkv_each_32(type, src, n, [&](__m256i q, float d, int off, int64_t i) {
        _mm256_storeu_si256((__m256i *) (codes + i), q);
        scales [i/32] = d;
        offsets[i/32] = d*off;
    });
}

static void xkv_i8_to_f32(ggml_type type, const char * src, float * dst, int64_t n) {
    xkv_each_32(type, src, n, [&](__m256i q, float d, int off, int64_t i) {
        q = _mm256_sub_epi8(q, _mm256_set1_epi8((char) off));

        const __m256 dv = _mm256_set1_ps(d);
        for (int k = 0; k < 4; ++k) {
            const __m128i h = k < 2 ? _mm256_castsi256_si128(q) : _mm256_extracti128_si256(q, 1);
            const __m128i b = k % 2 == 0 ? h : _mm_srli_si128(h, 8);
            _mm256_storeu_ps(dst + i + 8*k, _mm256_mul_ps(dv, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b))));
        }
    });
}

void xkv_cpu_round_i8(const float * src, int8_t * codes, float * scales, float * sums, int64_t n) {
    const __m256  sign  = _mm256_set1_ps(-0.0f);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t i = 0; i < n; i += 32) {
        __m256 x[4];
        for (int k = 0; k < 4; ++k) {
            x[k] = _mm256_loadu_ps(src + i + 8*k);
        }
        const __m256 m8 = _mm256_max_ps(_mm256_max_ps(_mm256_andnot_ps(sign, x[0]), _mm256_andnot_ps(sign, x[1])),
                                        _mm256_max_ps(_mm256_andnot_ps(sign, x[2]), _mm256_andnot_ps(sign, x[3])));
        const __m128 m4 = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
        const __m128 m2 = _mm_max_ps(m4, _mm_movehl_ps(m4, m4));
        const float  m  = _mm_cvtss_f32(_mm_max_ss(m2, _mm_movehdup_ps(m2)));

        const __m256 scale = _mm256_set1_ps(m > 0.0f ? 127.0f/m : 0.0f);
        __m256i q[4];
        for (int k = 0; k < 4; ++k) {
            q[k] = _mm256_cvtps_epi32(_mm256_mul_ps(x[k], scale));
        }
        const __m256i b = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        _mm256_storeu_si256((__m256i *) (codes + i), _mm256_permutevar8x32_epi32(b, order));

        const __m256i s8 = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        const __m128i s4 = _mm_add_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
        const __m128i s2 = _mm_add_epi32(s4, _mm_unpackhi_epi64(s4, s4));

        scales[i/32] = m/127.0f;
        sums  [i/32] = m/127.0f*_mm_cvtsi128_si32(_mm_add_epi32(s2, _mm_shuffle_epi32(s2, 1)));
    }
}

#else

void xkv_cpu_to_i8(ggml_type, const char *, int8_t *, float *, float *, int64_t) {
    GGML_ABORT("not used");
}

void xkv_cpu_round_i8(const float *, int8_t *, float *, float *, int64_t) {
    GGML_ABORT("not used");
}

#endif

void xkv_cpu_to_f32(ggml_type type, const char * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else if (type == GGML_TYPE_F16) {
        ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
#if defined(XKV_CPU_I8)
    } else if (xkv_cpu_is_i8(type)) {
        xkv_i8_to_f32(type, src, dst, n);
#endif
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

void * xkv_cpu_get_proc_address(const char * name) {
    static const struct {
        const char *     name;
        ggml_custom_op_t fun;
    } ops[] = {
        { "xkv_cpu_project", xkv_cpu_project },
        { "xkv_cpu_scores",  xkv_cpu_scores  },
        { "xkv_cpu_gather",  xkv_cpu_gather  },
        { "xkv_cpu_output",  xkv_cpu_output  },
    };
    for (const auto & op : ops) {
        if (strcmp(op.name, name) == 0) {
            return (void *) op.fun;
        }
    }
    return nullptr;
}
