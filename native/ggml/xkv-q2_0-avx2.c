// Dot product of q2_0 and q8_0 rows with AVX2: upstream has it for Arm only, and half of an xkv cache can be q2_0.

#define GGML_COMMON_IMPL_C
#include "ggml-common.h"
#include "ggml-impl.h"
#include "quants.h"
#include "simd-mappings.h"

#if defined(__AVX2__)

#    include <assert.h>
#    include <immintrin.h>

// 8 bytes of codes, 4 per byte from the low bits up, as 32 bytes 0 to 3
static inline __m256i xkv_unpack_2bit(const uint8_t * qs) {
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) qs));
    const __m256i u =
        _mm256_or_si256(_mm256_or_si256(b, _mm256_slli_epi32(b, 6)), _mm256_or_si256(_mm256_slli_epi32(b, 12), _mm256_slli_epi32(b, 18)));
    return _mm256_and_si256(u, _mm256_set1_epi8(3));
}

void ggml_vec_dot_q2_0_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx,
                            const void * GGML_RESTRICT vy, size_t by, int nrc) {
    const block_q2_0 * GGML_RESTRICT x = vx;
    const block_q8_0 * GGML_RESTRICT y = vy;

    assert(n % QK2_0 == 0);
    assert(nrc == 1);
    GGML_UNUSED(nrc);
    GGML_UNUSED(bx);
    GGML_UNUSED(by);
    GGML_UNUSED(bs);

    const __m256i ones_8  = _mm256_set1_epi8(1);
    const __m256i ones_16 = _mm256_set1_epi16(1);

    __m256 acc = _mm256_setzero_ps();
    for (int i = 0; i < n / QK2_0; ++i) {
        __m256 sum = _mm256_setzero_ps();
        for (int k = 0; k < 2; ++k) {
            const block_q8_0 * GGML_RESTRICT yb = &y[2 * i + k];

            // codes stand for -1 to 2
            const __m256i qy = _mm256_loadu_si256((const __m256i *) yb->qs);
            const __m256i dot =
                _mm256_sub_epi16(_mm256_maddubs_epi16(xkv_unpack_2bit(x[i].qs + 8 * k), qy), _mm256_maddubs_epi16(ones_8, qy));
            const __m256 f = _mm256_cvtepi32_ps(_mm256_madd_epi16(dot, ones_16));

            sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(yb->d)), f));
        }
        acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_set1_ps(GGML_CPU_FP16_TO_FP32(x[i].d)), sum));
    }
    const __m128 h = _mm_add_ps(_mm256_castps256_ps128(acc), _mm256_extractf128_ps(acc, 1));
    const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
    *s             = _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

#endif
