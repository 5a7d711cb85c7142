// Rows of any type as f32, and the ops by name.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "xkv-cpu-kernels.h"

#include "ggml-cpu.h"

#if defined(__AVX2__)

#include <immintrin.h>

static inline void xkv_store_i8(__m256i q, float d, float * dst) {
    const __m256  dv = _mm256_set1_ps(d);
    const __m128i lo = _mm256_castsi256_si128(q);
    const __m128i hi = _mm256_extracti128_si256(q, 1);
    _mm256_storeu_ps(dst,      _mm256_mul_ps(dv, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(lo))));
    _mm256_storeu_ps(dst + 8,  _mm256_mul_ps(dv, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(lo, 8)))));
    _mm256_storeu_ps(dst + 16, _mm256_mul_ps(dv, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(hi))));
    _mm256_storeu_ps(dst + 24, _mm256_mul_ps(dv, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(hi, 8)))));
}

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

static void xkv_from_q8_0(const block_q8_0 * x, float * dst, int64_t n) {
    for (int64_t i = 0; i < n/QK8_0; ++i) {
        xkv_store_i8(_mm256_loadu_si256((const __m256i *) x[i].qs), GGML_CPU_FP16_TO_FP32(x[i].d), dst + i*QK8_0);
    }
}

static void xkv_from_q5_0(const block_q5_0 * x, float * dst, int64_t n) {
    for (int64_t i = 0; i < n/QK5_0; ++i) {
        // without the fifth bit a code stands for 16 less
        const __m256i high = _mm256_andnot_si256(xkv_load_bits(x[i].qh), _mm256_set1_epi8((char) 0xf0));
        xkv_store_i8(_mm256_or_si256(xkv_load_nibbles(x[i].qs), high), GGML_CPU_FP16_TO_FP32(x[i].d), dst + i*QK5_0);
    }
}

static void xkv_from_q4_0(const block_q4_0 * x, float * dst, int64_t n) {
    for (int64_t i = 0; i < n/QK4_0; ++i) {
        const __m256i q = _mm256_sub_epi8(xkv_load_nibbles(x[i].qs), _mm256_set1_epi8(8));
        xkv_store_i8(q, GGML_CPU_FP16_TO_FP32(x[i].d), dst + i*QK4_0);
    }
}

static void xkv_from_q2_0(const block_q2_0 * x, float * dst, int64_t n) {
    for (int64_t i = 0; i < n/QK2_0; ++i) {
        for (int k = 0; k < 2; ++k) {
            const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) (x[i].qs + 8*k)));
            const __m256i u = _mm256_or_si256(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)),
                                              _mm256_or_si256(_mm256_slli_epi32(b, 12), _mm256_slli_epi32(b, 18)));
            const __m256i q = _mm256_sub_epi8(_mm256_and_si256(u, _mm256_set1_epi8(3)), _mm256_set1_epi8(1));
            xkv_store_i8(q, GGML_CPU_FP16_TO_FP32(x[i].d), dst + i*QK2_0 + 32*k);
        }
    }
}

static void xkv_from_q1_0(const block_q1_0 * x, float * dst, int64_t n) {
    for (int64_t i = 0; i < n/QK1_0; ++i) {
        for (int k = 0; k < 4; ++k) {
            const __m256i minus = _mm256_cmpeq_epi8(xkv_load_bits(x[i].qs + 4*k), _mm256_setzero_si256());
            xkv_store_i8(_mm256_or_si256(minus, _mm256_set1_epi8(1)), GGML_CPU_FP16_TO_FP32(x[i].d), dst + i*QK1_0 + 32*k);
        }
    }
}

#endif

void xkv_cpu_to_f32(ggml_type type, const char * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(dst, src, n*sizeof(float)); return;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); return;
#if defined(__AVX2__)
        case GGML_TYPE_Q8_0: xkv_from_q8_0((const block_q8_0 *) src, dst, n); return;
        case GGML_TYPE_Q5_0: xkv_from_q5_0((const block_q5_0 *) src, dst, n); return;
        case GGML_TYPE_Q4_0: xkv_from_q4_0((const block_q4_0 *) src, dst, n); return;
        case GGML_TYPE_Q2_0: xkv_from_q2_0((const block_q2_0 *) src, dst, n); return;
        case GGML_TYPE_Q1_0: xkv_from_q1_0((const block_q1_0 *) src, dst, n); return;
#endif
        default: ggml_get_type_traits(type)->to_float(src, dst, n);
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
