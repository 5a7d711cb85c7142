// Decoding on CUDA: exact tokens, in spans whose sums stand apart.

#pragma once

#include "xkv-cu-decode.cuh"

#define XKV_CU_EXACT_THREADS 128
#define XKV_CU_EXACT_BLOCK   32 // tokens, one for each lane of a warp
#define XKV_CU_VECS          8  // queries that a block of threads has

// pairs of numbers of a head that a thread sums
#define XKV_CU_EXACT_OWN (XKV_CU_MAX_HEAD / XKV_CU_EXACT_THREADS / 2)

// numbers d and d + 1 of a row, d even
static __device__ __forceinline__ float2 xkv_cu_exact_two(const xkv_cu_exact & x, const char * row, int d) {
    switch (x.type) {
    case XKV_CU_F32:
        return make_float2(((const float *) row)[d], ((const float *) row)[d + 1]);
    case XKV_CU_F16:
        return xkv_cu_two_halves(row + 2 * d);
    default: { // Q8_0
        const char * block = row + d / 32 * 34;
        const float  f     = xkv_cu_half(block);
        return make_float2(f * (float) *(const int8_t *) (block + 2 + d % 32), f * (float) *(const int8_t *) (block + 3 + d % 32));
    }
    }
}

static __device__ __forceinline__ const char * xkv_cu_exact_row(const xkv_cu_exact & x, int token, int head, int s) {
    return x.data + head * x.nb[0] + token * x.nb[1] + s * x.nb[2];
}

static __device__ __forceinline__ float xkv_cu_mask_at(const xkv_cu_attn & a, int token, int t, int s) {
    const char * p = a.mask + t * a.nb_mask[0] + s * a.nb_mask[1];
    return a.mask_f16 ? xkv_cu_half(p + 2 * (size_t) token) : ((const float *) p)[token];
}

struct xkv_cu_exact_shared {
    float * q;     // [vectors][d_k]
    float * score; // [vectors][tokens], then weights
    float * max;
    float * sum;
    float * factor;

    __host__ __device__ xkv_cu_exact_shared(const xkv_cu_attn & a, xkv_cu_arena & at) {
        q      = at.take<float>(XKV_CU_VECS * a.dim[XKV_CU_K]);
        score  = at.take<float>(XKV_CU_VECS * XKV_CU_EXACT_BLOCK);
        max    = at.take<float>(XKV_CU_VECS);
        sum    = at.take<float>(XKV_CU_VECS);
        factor = at.take<float>(XKV_CU_VECS);
    }
};

// by a warp: scores of a token
static __device__ void xkv_cu_exact_score(const xkv_cu_attn & a, const xkv_cu_exact_shared & c, const char * row, int n, int k) {
    float acc[XKV_CU_VECS] = {};
    for (int d = 2 * xkv_cu_lane(); d < a.dim[XKV_CU_K]; d += 2 * XKV_CU_WARP) {
        const float2 x = xkv_cu_exact_two(a.exact[XKV_CU_K], row, d);
#pragma unroll
        for (int i = 0; i < XKV_CU_VECS; ++i) {
            if (i < n) {
                const float2 y = *(const float2 *) (c.q + i * a.dim[XKV_CU_K] + d);
                acc[i] += x.x * y.x + x.y * y.y;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < XKV_CU_VECS; ++i) {
        if (i < n) {
            acc[i]    = xkv_cu_sum(acc[i]);
            float * x = c.score + i * XKV_CU_EXACT_BLOCK + k;
            if (xkv_cu_lane() == 0 && *x > -INFINITY) {
                *x += xkv_cu_cap(a, acc[i]);
            }
        }
    }
}

// grid: span, queries of a KV head, stream
static __global__ void __launch_bounds__(XKV_CU_EXACT_THREADS)
    xkv_cu_exact_span(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int n_token) {
    XKV_DYNAMIC_SHARED(shared);
    const int m      = a.n_tps * a.n_gqa;
    const int n_unit = (m + XKV_CU_VECS - 1) / XKV_CU_VECS;
    const int head   = blockIdx.y / n_unit;
    const int first  = blockIdx.y % n_unit * XKV_CU_VECS;
    const int j0     = head * m + first;
    const int n      = min(XKV_CU_VECS, m - first);
    const int s      = blockIdx.z;
    const int dk     = a.dim[XKV_CU_K];
    const int dv     = a.dim[XKV_CU_V];
    const int end    = min(a.n_exact, (int) (blockIdx.x + 1) * n_token);

    xkv_cu_arena              arena = { (char *) shared };
    const xkv_cu_exact_shared c(a, arena);

    float2 acc[XKV_CU_EXACT_OWN][XKV_CU_VECS] = {};
    for (int i = 0; i < n; ++i) {
        const float * x = xkv_cu_query_row(a, xkv_cu_find_query(a, j0 + i).out, s);
        for (int d = threadIdx.x; d < dk; d += blockDim.x) {
            c.q[i * dk + d] = x[d] * a.scale;
        }
    }
    if ((int) threadIdx.x < n) {
        c.max[threadIdx.x] = -INFINITY;
        c.sum[threadIdx.x] = 0.0f;
    }
    for (int k0 = blockIdx.x * n_token; k0 < end; k0 += XKV_CU_EXACT_BLOCK) {
        const int n_k = min(XKV_CU_EXACT_BLOCK, end - k0);
        bool      any = false;
        for (int e = threadIdx.x; e < n * XKV_CU_EXACT_BLOCK; e += blockDim.x) {
            const int   k    = e % XKV_CU_EXACT_BLOCK;
            const int   t    = (first + e / XKV_CU_EXACT_BLOCK) / a.n_gqa;
            const float bias = k < n_k ? xkv_cu_mask_at(a, k0 + k, t, s) : -INFINITY;
            c.score[e]       = bias;
            any              = any || bias > -INFINITY;
        }
        if (!__syncthreads_or(any)) {
            continue;
        }
        for (int k = xkv_cu_warp(); k < n_k; k += xkv_cu_n_warp()) {
            xkv_cu_exact_score(a, c, xkv_cu_exact_row(a.exact[XKV_CU_K], k0 + k, head, s), n, k);
        }
        __syncthreads();
        for (int i = xkv_cu_warp(); i < n; i += xkv_cu_n_warp()) {
            const float x   = c.score[i * XKV_CU_EXACT_BLOCK + xkv_cu_lane()];
            const float old = c.max[i];
            const float max = fmaxf(old, xkv_cu_max(x));
            const float p   = x == -INFINITY ? 0.0f : expf(x - max);
            const float sum = xkv_cu_sum(p);

            c.score[i * XKV_CU_EXACT_BLOCK + xkv_cu_lane()] = p;
            if (xkv_cu_lane() == 0) {
                c.factor[i] = xkv_cu_rescale(old, max);
                c.max[i]    = max;
                c.sum[i]    = c.sum[i] * c.factor[i] + sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (int o = 0; o < XKV_CU_EXACT_OWN; ++o) {
            const int d = 2 * (threadIdx.x + o * XKV_CU_EXACT_THREADS);
            if (d >= dv) {
                break;
            }
#pragma unroll
            for (int i = 0; i < XKV_CU_VECS; ++i) {
                const float f = i < n ? c.factor[i] : 0.0f;
                acc[o][i]     = make_float2(acc[o][i].x * f, acc[o][i].y * f);
            }
#pragma unroll 2
            for (int k = 0; k < n_k; ++k) {
                const float2 v = xkv_cu_exact_two(a.exact[XKV_CU_V], xkv_cu_exact_row(a.exact[XKV_CU_V], k0 + k, head, s), d);
#pragma unroll
                for (int i = 0; i < XKV_CU_VECS; ++i) {
                    if (i < n) {
                        const float p = c.score[i * XKV_CU_EXACT_BLOCK + k];
                        acc[o][i].x += p * v.x;
                        acc[o][i].y += p * v.y;
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < XKV_CU_VECS; ++i) {
        if (i >= n) {
            break;
        }
        const size_t at = b.span(s, blockIdx.x, j0 + i);
        if (threadIdx.x == 0) {
            b.exact_state[at] = make_float2(c.max[i], c.sum[i]);
        }
#pragma unroll
        for (int o = 0; o < XKV_CU_EXACT_OWN; ++o) {
            const int d = 2 * (threadIdx.x + o * XKV_CU_EXACT_THREADS);
            if (d < dv) {
                *(float2 *) (b.exact + at * dv + d) = acc[o][i];
            }
        }
    }
}
