// Many queries on CUDA: K and V of a batch of tokens are made for all KV heads as f16, meet all queries and are forgotten. A query
// keeps a running max and sum, and its output is where the sums are.

#pragma once

#include "xkv-cu-exact.cuh"

#define XKV_CU_BATCH 512 // tokens
#define XKV_CU_STEP  64  // of them, that queries meet at a time
#define XKV_CU_PIECE 128 // numbers of a head of V that a block of threads sums

struct xkv_cu_prefill {
    float *  made;  // [KV head][XKV_CU_BATCH][d_k] in the frames of their chunks, without the mean
    half *   k;     // [KV head][XKV_CU_BATCH][d_k]
    half *   v;     // [KV head][d_v][XKV_CU_BATCH]
    float2 * state; // [piece of V][query] max and sum of weights
    int      n_query;
};

// stored K with its mean, turned back from its chunk's frame; grid: tokens from first on, KV head
static __global__ void xkv_cu_turn_back(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first) {
    const int     head  = blockIdx.y;
    const int     dk    = a.dim[XKV_CU_K];
    const int     ic    = (first + blockIdx.x) / a.n_chunk;
    const size_t  at    = ((size_t) head * XKV_CU_BATCH + blockIdx.x) * dk;
    const float * x     = b.made + at;
    half *        y     = b.k + at;
    const float * mean  = a.mean + head * dk;
    const float * c     = (const float *) (a.turn + ((size_t) s * a.n_frame + ic) * a.nb_turn);
    const int     pairs = a.n_rot / 2;
    for (int i = threadIdx.x; i < dk - pairs; i += blockDim.x) {
        if (i < pairs) {
            const int   r0 = a.neox ? i : 2 * i;
            const int   r1 = a.neox ? i + pairs : 2 * i + 1;
            const int   d0 = a.rot_first + r0;
            const int   d1 = a.rot_first + r1;
            const float y0 = x[d0] + mean[d0];
            const float y1 = x[d1] + mean[d1];
            y[d0]          = __float2half(y0 * c[r0] + y1 * c[r1]);
            y[d1]          = __float2half(y1 * c[r0] - y0 * c[r1]);
        } else {
            const int k = i - pairs; // of the numbers that are not turned
            const int d = k < a.rot_first ? k : k + a.n_rot;
            y[d]        = __float2half(x[d] + mean[d]);
        }
    }
}

// exact tokens, and zeros up to whole steps; grid: tokens from first on, KV head
static __global__ void xkv_cu_load_exact(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first) {
    const int head  = blockIdx.y;
    const int slot  = blockIdx.x;
    const int token = first + slot;
    for (int kd = 0; kd < 2; ++kd) {
        const int    dim = a.dim[kd];
        const char * row = xkv_cu_exact_row(a.exact[kd], token, head, s);
        for (int d = 2 * threadIdx.x; d < dim; d += 2 * blockDim.x) {
            const float2 x  = token < a.n_exact ? xkv_cu_exact_two(a.exact[kd], row, d) : make_float2(0.0f, 0.0f);
            const size_t at = (size_t) head * XKV_CU_BATCH * dim;
            half *       y  = kd == XKV_CU_K ? b.k + at + slot * dim + d : b.v + at + d * XKV_CU_BATCH + slot;

            y[0]                                 = __float2half(x.x);
            y[kd == XKV_CU_K ? 1 : XKV_CU_BATCH] = __float2half(x.y);
        }
    }
}

static __global__ void xkv_cu_begin(const xkv_cu_prefill b, int n) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < n) {
        b.state[j] = make_float2(-INFINITY, 0.0f);
    }
}

// grid: query
static __global__ void xkv_cu_end(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s) {
    const float2 state = b.state[blockIdx.x];
    const int    out   = xkv_cu_find_query(a, blockIdx.x).out;
    const float  sink  = xkv_cu_sink(a, out);
    const float  max   = fmaxf(state.x, sink);
    const float  sum   = (state.x == -INFINITY ? state.y : state.y * expf(state.x - max)) + xkv_cu_rescale(sink, max);
    const float  f     = state.x == -INFINITY ? 1.0f : expf(state.x - max);
    float *      o     = a.dst + ((size_t) s * b.n_query + out) * a.dim[XKV_CU_V];
    for (int d = threadIdx.x; d < a.dim[XKV_CU_V]; d += blockDim.x) {
        o[d] = state.y == 0.0f ? 0.0f : o[d] * f / sum; // without tokens there are no sums; what is no number is no 0
    }
}
