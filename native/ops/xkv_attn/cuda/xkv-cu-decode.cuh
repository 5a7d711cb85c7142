// Decoding on CUDA: device memory of a run, and what its kernels share. A first pass counts all stored tokens by the lead and keeps
// the share of each block of 16; then each query's softmax has a size, and blocks with more than the tolerance of it are counted
// again with all directions.

#pragma once

#include "xkv-cu-query.cuh"

#define XKV_CU_TILE  32  // most queries of a block of threads
#define XKV_CU_G     4   // the same in groups of 8
#define XKV_CU_AHEAD 4   // most chunks whose queries go through the lead together
#define XKV_CU_SLICE 128 // directions that they go through at a time

// directions of V that a block of threads has in the second pass, 16 to a warp
#define XKV_CU_V_SLICE (XKV_CU_THREADS / XKV_CU_WARP * 16)

// Stored tokens are split: split k has every n_split-th chunk. A pair of a chunk and a query that is refined is a row of what
// follows for the chunks of a span: [stream][chunk of the span][query].
struct xkv_cu_decode {
    int n_query, n_split, n_exact; // n_exact: spans of exact tokens
    int n_span, n_deep;            // chunks of a span of the second pass; splits of its sums
    int lead_v;                    // numbers of a query's sums by the lead

    float *  sums;     // [stream][split][query][lead_v] by the lead, weighted by exp(score)
    float *  sums_max; // [stream][split][query] score that they are relative to
    float2 * state;    // [stream][split][query] max, sum of weights
    float *  exact;    // [stream][span][query][d_v]
    float2 * exact_state;
    float *  share; // [stream][query][block of tokens] log of its sum of weights by the lead; -inf once refined
    float2 * least; // [stream][query] log of the sum of weights beyond which a block is refined: the least so far, this round's

    uint32_t *  fine;  // by row: blocks that are refined
    int *       list;  // [stream][KV head][chunk of the span * query of the KV head] rows with some
    int *       count; // [stream][KV head]
    xkv_cu_rows y;     // by row: the query through the basis of K
    xkv_cu_rows fresh; // by row: weights of blocks that are refined
    xkv_cu_rows taken; // by row: what these had been counted with, negative
    float *     top;   // by row: score that these weights are relative to

    float * deep;     // [stream][deep split][query][rank] what refinement adds, relative to
    float * deep_max; // [stream][deep split][slice of V][query]

    __host__ __device__ size_t part(int s, int split, int j) const { return ((size_t) s * n_split + split) * n_query + j; }
    __host__ __device__ size_t span(int s, int span, int j) const { return ((size_t) s * n_exact + span) * n_query + j; }
    __host__ __device__ size_t row(int s, int ic, int j) const { return ((size_t) s * n_span + ic) * n_query + j; }
    __host__ __device__ size_t deep_part(int s, int k, int j) const { return ((size_t) s * n_deep + k) * n_query + j; }

    __device__ float * shares(const xkv_cu_attn & a, int s, int ic, int j) const {
        return share + (((size_t) s * n_query + j) * a.n_frame + ic) * xkv_cu_n_fine(a);
    }
};

// by a warp: max and sum of a query's weights over all parts
static __device__ float2 xkv_cu_total(const xkv_cu_attn & a, const xkv_cu_decode & b, int s, int j) {
    const float sink = xkv_cu_sink(a, xkv_cu_find_query(a, j).out);
    float       max  = sink;
    for (int k = xkv_cu_lane(); k < b.n_split; k += XKV_CU_WARP) {
        max = fmaxf(max, b.state[b.part(s, k, j)].x);
    }
    for (int k = xkv_cu_lane(); k < b.n_exact; k += XKV_CU_WARP) {
        max = fmaxf(max, b.exact_state[b.span(s, k, j)].x);
    }
    max       = xkv_cu_max(max);
    float sum = xkv_cu_lane() == 0 ? xkv_cu_rescale(sink, max) : 0.0f;
    for (int k = xkv_cu_lane(); k < b.n_split; k += XKV_CU_WARP) {
        const float2 state = b.state[b.part(s, k, j)];
        sum += xkv_cu_rescale(state.x, max) * state.y;
    }
    for (int k = xkv_cu_lane(); k < b.n_exact; k += XKV_CU_WARP) {
        const float2 state = b.exact_state[b.span(s, k, j)];
        sum += xkv_cu_rescale(state.x, max) * state.y;
    }
    return make_float2(max, xkv_cu_sum(sum));
}

// which blocks a round refines; grid: query, stream; one warp
static __global__ void xkv_cu_least(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int round) {
    // by how much, as a logarithm, a query's softmax has to become smaller for another round
    const float  less  = 0.5f;
    const int    j     = blockIdx.x;
    const int    s     = blockIdx.y;
    const float2 total = xkv_cu_total(a, b, s, j);
    float2 *     least = b.least + (size_t) s * b.n_query + j;
    if (xkv_cu_lane() == 0) {
        const float now = total.y > 0.0f ? logf(total.y * a.tolerance) + total.x : INFINITY;
        const float old = round == 0 ? INFINITY : least->x;
        *least          = now < old - less ? make_float2(now, now) : make_float2(old, INFINITY);
    }
}
