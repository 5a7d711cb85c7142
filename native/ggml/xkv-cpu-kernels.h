// What the fused ops share: rows of any type as f32, products in registers, work by thread.

#pragma once

#include "xkv-cpu.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

// numbers as f32; n is a multiple of the type's block
void xkv_cpu_to_f32(ggml_type type, const char * src, float * dst, int64_t n);

// Coefficients of quantized types meet queries (and weights) that are rounded to 8 bits with a scale per 32, as with
// stock ops: that is twice as fast as f32 and saves most of the conversion.
#if defined(__AVX2__)
#    define XKV_CPU_I8
#endif

static inline bool xkv_cpu_is_i8(ggml_type type) {
#if defined(XKV_CPU_I8)
    return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q5_0 || type == GGML_TYPE_Q4_0 || type == GGML_TYPE_Q2_0 || type == GGML_TYPE_Q1_0;
#else
    GGML_UNUSED(type);
    return false;
#endif
}

// Codes in 8 bits with numbers per 32 codes. Coefficients are scale*code - offset; their codes are unsigned, except for
// q8_0, whose offsets are 0. What they meet is scale*code, and sum is that of 32 numbers.
struct xkv_i8 {
    const int8_t * codes;
    const float *  scales;
    const float *  sums; // coefficients: offsets
};

// coefficients of such a type
void xkv_cpu_to_i8(ggml_type type, const char * src, int8_t * codes, float * scales, float * offsets, int64_t n);

// n numbers, a multiple of 32, rounded
void xkv_cpu_round_i8(const float * src, int8_t * codes, float * scales, float * sums, int64_t n);

// blocks that stay in the first-level cache, for 4 rows; the padding keeps rows off the same cache sets
#define XKV_CPU_BLOCK  1024
#define XKV_CPU_STRIDE (XKV_CPU_BLOCK + 32)

// scalable vectors have no fixed length to block registers for
#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic) && 32 % GGML_F32_EPR == 0
#    define XKV_CPU_SIMD
#endif

// s[i][r] = x row r times y[i], for 4 rows of x, bx numbers apart
template <int N> static inline void xkv_dot_rows(int64_t n, const float * x, int64_t bx, const float * const * y, float (*s)[4]) {
    int64_t k = 0;
#if defined(XKV_CPU_SIMD)
    GGML_F32_VEC acc[N][4];
    for (int i = 0; i < N; ++i) {
        for (int r = 0; r < 4; ++r) {
            acc[i][r] = GGML_F32_VEC_ZERO;
        }
    }
    for (; k + GGML_F32_EPR <= n; k += GGML_F32_EPR) {
        GGML_F32_VEC yv[N];
        for (int i = 0; i < N; ++i) {
            yv[i] = GGML_F32_VEC_LOAD(y[i] + k);
        }
        for (int r = 0; r < 4; ++r) {
            const GGML_F32_VEC xv = GGML_F32_VEC_LOAD(x + r*bx + k);
            for (int i = 0; i < N; ++i) {
                acc[i][r] = GGML_F32_VEC_FMA(acc[i][r], xv, yv[i]);
            }
        }
    }
    for (int i = 0; i < N; ++i) {
#if defined(__AVX2__) && !defined(__AVX512F__)
        const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(acc[i][0], acc[i][1]), _mm256_hadd_ps(acc[i][2], acc[i][3]));
        _mm_storeu_ps(s[i], _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
        for (int r = 0; r < 4; ++r) {
            float t[GGML_F32_EPR];
            GGML_F32_VEC_STORE(t, acc[i][r]);
            s[i][r] = 0.0f;
            for (int j = 0; j < GGML_F32_EPR; ++j) {
                s[i][r] += t[j];
            }
        }
#endif
    }
#else
    memset(s, 0, N*sizeof(*s));
#endif
    for (; k < n; ++k) {
        for (int i = 0; i < N; ++i) {
            for (int r = 0; r < 4; ++r) {
                s[i][r] += x[r*bx + k]*y[i][k];
            }
        }
    }
}

#if defined(XKV_CPU_I8)
static inline __m256 xkv_fma(__m256 acc, __m256 x, __m256 y) {
#    if defined(__FMA__)
    return _mm256_fmadd_ps(x, y, acc);
#    else
    return _mm256_add_ps(acc, _mm256_mul_ps(x, y));
#    endif
}
#endif

// the same for codes
template <int N, bool SIGNED>
static inline void xkv_dot_rows_i8(int64_t n, const xkv_i8 & x, int64_t bx, const xkv_i8 * y, float (*s)[4]) {
#if defined(XKV_CPU_I8)
    // 2 times 4 sums are what stays in registers
    static_assert(N <= 2, "more sums than registers");

    const __m256i ones = _mm256_set1_epi16(1);

    float scale[N][4][XKV_CPU_BLOCK/32];
    for (int64_t b = 0; b < n/32; b += 8) {
        for (int i = 0; i < N; ++i) {
            const __m256 ys = _mm256_loadu_ps(y[i].scales + b);
            for (int r = 0; r < 4; ++r) {
                _mm256_storeu_ps(scale[i][r] + b, _mm256_mul_ps(ys, _mm256_loadu_ps(x.scales + r*(bx/32) + b)));
            }
        }
    }
    __m256 a00 = _mm256_setzero_ps(), a01 = a00, a02 = a00, a03 = a00;
    __m256 a10 = a00, a11 = a00, a12 = a00, a13 = a00;

    // what all offsets add
    for (int64_t b = 0; !SIGNED && b < n/32; b += 8) {
        const __m256i in   = _mm256_cmpgt_epi32(_mm256_set1_epi32((int) (n/32 - b)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const __m256  s0   = _mm256_maskload_ps(y[0].sums + b, in);
        const __m256  s1   = _mm256_maskload_ps(y[N - 1].sums + b, in);
        const auto    take = [&](int r, __m256 & acc0, __m256 & acc1) {
            const __m256 off = _mm256_sub_ps(_mm256_setzero_ps(), _mm256_maskload_ps(x.sums + r*(bx/32) + b, in));
            acc0 = xkv_fma(acc0, off, s0);
            acc1 = xkv_fma(acc1, off, s1);
        };
        take(0, a00, a10);
        take(1, a01, a11);
        take(2, a02, a12);
        take(3, a03, a13);
    }

    const auto dot = [&](__m256 & acc, __m256i ax, __m256i xv, __m256i yv, float d) {
        const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(ax, SIGNED ? _mm256_sign_epi8(yv, xv) : yv), ones);
        acc = xkv_fma(acc, _mm256_cvtepi32_ps(p), _mm256_set1_ps(d));
    };
    for (int64_t b = 0; b < n/32; ++b) {
        const __m256i y0 = _mm256_loadu_si256((const __m256i *) (y[0].codes + 32*b));
        const __m256i y1 = _mm256_loadu_si256((const __m256i *) (y[N - 1].codes + 32*b));

        const auto row = [&](int r, __m256 & acc0, __m256 & acc1) {
            const __m256i xv = _mm256_loadu_si256((const __m256i *) (x.codes + r*bx + 32*b));
            const __m256i ax = SIGNED ? _mm256_abs_epi8(xv) : xv;
            dot(acc0, ax, xv, y0, scale[0][r][b]);
            if (N > 1) {
                dot(acc1, ax, xv, y1, scale[N - 1][r][b]);
            }
        };
        row(0, a00, a10);
        row(1, a01, a11);
        row(2, a02, a12);
        row(3, a03, a13);
    }
    const auto store = [](float * dst, __m256 r0, __m256 r1, __m256 r2, __m256 r3) {
        const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(r0, r1), _mm256_hadd_ps(r2, r3));
        _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
    };
    store(s[0], a00, a01, a02, a03);
    if (N > 1) {
        store(s[N - 1], a10, a11, a12, a13);
    }
#else
    GGML_UNUSED(n);
    GGML_UNUSED(x);
    GGML_UNUSED(bx);
    GGML_UNUSED(y);
    GGML_UNUSED(s);
#endif
}

template <int N> static inline void xkv_dot_rows(int64_t n, const xkv_i8 & x, int64_t bx, const xkv_i8 * y, float (*s)[4]) {
    if (x.sums) {
        xkv_dot_rows_i8<N, false>(n, x, bx, y, s);
    } else {
        xkv_dot_rows_i8<N, true>(n, x, bx, y, s);
    }
}

// dst[i][r] += x row r times y[i], for up to 4 rows of x and any number of y, rows bx numbers apart
template <typename X, typename Y, typename D>
static inline void xkv_add_dots(int64_t n, int n_row, X && x, int64_t bx, int64_t n_y, Y && y, D && dst) {
    using row = decltype(y(0));

    constexpr int N = std::is_same<row, xkv_i8>::value ? 2 : 3;

    float s[N][4];
    for (int64_t i = 0; i < n_y; i += N) {
        const int m = (int) std::min<int64_t>(N, n_y - i);

        row yp[N];
        for (int j = 0; j < N; ++j) {
            yp[j] = j < m ? y(i + j) : row();
        }
        switch (m) {
            case 1:  xkv_dot_rows<1>(n, x, bx, yp, s); break;
            case 2:  xkv_dot_rows<2>(n, x, bx, yp, s); break;
            default: xkv_dot_rows<N>(n, x, bx, yp, s); break;
        }
        for (int j = 0; j < m; ++j) {
            float * d = dst(i + j);
            for (int r = 0; r < n_row; ++r) {
                d[r] += s[j][r];
            }
        }
    }
}

// c[i][0 .. 31] += sum over k of a[i][k] times row k of b, rows of b of 32 numbers
template <int M> static inline void xkv_mul_32(int64_t n, const float * const * a, const float * b, float * const * c) {
#if defined(XKV_CPU_SIMD)
    constexpr int NV = 32 % (2*GGML_F32_EPR) == 0 ? 2 : 1;
    for (int j = 0; j < 32; j += NV*GGML_F32_EPR) {
        GGML_F32_VEC acc[M][NV];
        for (int i = 0; i < M; ++i) {
            for (int v = 0; v < NV; ++v) {
                acc[i][v] = GGML_F32_VEC_LOAD(c[i] + j + v*GGML_F32_EPR);
            }
        }
        for (int64_t k = 0; k < n; ++k) {
            GGML_F32_VEC bv[NV];
            for (int v = 0; v < NV; ++v) {
                bv[v] = GGML_F32_VEC_LOAD(b + 32*k + j + v*GGML_F32_EPR);
            }
            for (int i = 0; i < M; ++i) {
                const GGML_F32_VEC av = GGML_F32_VEC_SET1(a[i][k]);
                for (int v = 0; v < NV; ++v) {
                    acc[i][v] = GGML_F32_VEC_FMA(acc[i][v], bv[v], av);
                }
            }
        }
        for (int i = 0; i < M; ++i) {
            for (int v = 0; v < NV; ++v) {
                GGML_F32_VEC_STORE(c[i] + j + v*GGML_F32_EPR, acc[i][v]);
            }
        }
    }
#else
    for (int64_t k = 0; k < n; ++k) {
        for (int i = 0; i < M; ++i) {
            for (int j = 0; j < 32; ++j) {
                c[i][j] += a[i][k]*b[32*k + j];
            }
        }
    }
#endif
}

static inline void xkv_mul_32(int m, int64_t n, const float * const * a, const float * b, float * const * c) {
    switch (m) {
        case 1:  xkv_mul_32<1>(n, a, b, c); break;
        case 2:  xkv_mul_32<2>(n, a, b, c); break;
        case 3:  xkv_mul_32<3>(n, a, b, c); break;
        case 4:  xkv_mul_32<4>(n, a, b, c); break;
        case 5:  xkv_mul_32<5>(n, a, b, c); break;
        default: xkv_mul_32<6>(n, a, b, c); break;
    }
}

// Directions from first on that fit a block, as long as key(segment) is the same. A cut inside a segment is at a multiple
// of the longest quantization block.
template <typename F>
static inline int64_t xkv_block_ranks(const xkv_cpu_segment * segments, int64_t n_segment, int64_t first, F && key) {
    int64_t end = first;
    for (int64_t i = 0; i < n_segment; ++i) {
        const auto &  seg  = segments[i];
        const int64_t room = first + XKV_CPU_BLOCK;
        if (seg.first + seg.rank <= end) {
            continue;
        }
        if (end > first && key(seg) != key(segments[i - 1])) {
            break;
        }
        if (seg.first + seg.rank <= room) {
            end = seg.first + seg.rank;
            continue;
        }
        return end + (room - end)/128*128 - first;
    }
    return end - first;
}

// f(segment, offset in it, n, offset in the block) for the parts of segments in directions [first, first + n)
template <typename F>
static inline void xkv_each_part(const xkv_cpu_segment * segments, int64_t n_segment, int64_t first, int64_t n, F && f) {
    for (int64_t i = 0; i < n_segment; ++i) {
        const auto &  seg = segments[i];
        const int64_t d0  = std::max(seg.first,            first);
        const int64_t d1  = std::min(seg.first + seg.rank, first + n);
        if (d0 < d1) {
            f(seg, d0 - seg.first, d1 - d0, d0 - first);
        }
    }
}

// two lists of items of different cost, split over threads by cost
struct xkv_work {
    int64_t n[2];
    int64_t cost[2];

    // items [begin[i], end[i]) of list i are the thread's
    void split(int ith, int nth, int64_t * begin, int64_t * end) const {
        bound(ith,     nth, begin);
        bound(ith + 1, nth, end);
    }

private:
    void bound(int ith, int nth, int64_t * res) const {
        const int64_t at = (n[0]*cost[0] + n[1]*cost[1])*ith/nth;
        for (int i = 0; i < 2; ++i) {
            const int64_t rest = i == 0 ? at : std::max<int64_t>(0, at - n[0]*cost[0]);
            res[i] = ith == nth ? n[i] : std::min(n[i], rest/std::max<int64_t>(1, cost[i]));
        }
    }
};
