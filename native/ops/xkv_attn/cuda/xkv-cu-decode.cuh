// Decoding on CUDA. A first pass counts all stored tokens by the lead and keeps the share of each block of 16; then each query's
// softmax has a size, and blocks with more than the tolerance of it are counted again with all directions.

#pragma once

#include "xkv-cu-chunk.cuh"

// by how much, as a logarithm, a query's softmax has to become smaller for another round
#define XKV_CU_ROUND_LESS 0.5f

static __device__ void xkv_cu_load_fill(const xkv_cu_chunk & c, int ic) {
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        c.fill[i] = xkv_cu_n_fill(c.a, ic, xkv_cu_find_query(c.a, c.j0 + i).token, c.s);
        c.fine[i] = (1u << (c.fill[i] + XKV_CU_FINE - 1) / XKV_CU_FINE) - 1;
    }
}

// by a warp: weights of all tokens of a chunk for query i, and the shares of its blocks
static __device__ void xkv_cu_weigh_lead(const xkv_cu_chunk & c, int ic, int i) {
    const int n     = c.a.n_chunk;
    float *   score = c.score + i * n;
    float *   share = c.share(i) + ic * c.n_fine();
    if (!c.fine[i]) {
        for (int f = xkv_cu_lane(); f < c.n_fine(); f += XKV_CU_WARP) {
            share[f] = -INFINITY;
        }
        return;
    }
    const float old = c.max[i];
    float       max = old;
    for (int t = xkv_cu_lane(); t < c.fill[i]; t += XKV_CU_WARP) {
        max = fmaxf(max, score[t]);
    }
    max       = xkv_cu_max(max);
    float sum = 0.0f;
    for (int t = xkv_cu_lane(); t < n; t += XKV_CU_WARP) {
        const float p = t < c.fill[i] ? expf(score[t] - max) : 0.0f;
        score[t]      = p;
        sum += p;
        const float block = xkv_cu_sum(p, XKV_CU_FINE);
        if (t % XKV_CU_FINE == 0) {
            share[t / XKV_CU_FINE] = logf(block) + max;
        }
    }
    sum = xkv_cu_sum(sum);
    if (xkv_cu_lane() == 0) {
        const float f = xkv_cu_rescale(old, max);
        c.factor[i]   = f;
        c.held[i]     = c.have[i];
        c.have[i]     = 1;
        c.max[i]      = max;
        c.sum[i]      = c.sum[i] * f + sum;
    }
}

// by a warp: weights of blocks that are refined, in score, and in rough what they have more than by the lead
static __device__ void xkv_cu_weigh_fine(const xkv_cu_chunk & c, int ic, int i) {
    if (!c.fine[i]) {
        return;
    }
    const int n     = c.a.n_chunk;
    float *   score = c.score + i * n;
    float *   rough = c.rough + i * n;
    float *   share = c.share(i) + ic * c.n_fine();

    const float old = c.max[i];
    float       max = old;
    for (int t = xkv_cu_lane(); t < c.fill[i]; t += XKV_CU_WARP) {
        if (c.fine[i] >> t / XKV_CU_FINE & 1) {
            max = fmaxf(max, score[t]);
        }
    }
    max       = xkv_cu_max(max);
    float sum = 0.0f;
    for (int t = xkv_cu_lane(); t < n; t += XKV_CU_WARP) {
        const bool  on   = t < c.fill[i] && (c.fine[i] >> t / XKV_CU_FINE & 1);
        const float p    = on ? expf(score[t] - max) : 0.0f;
        const float more = on ? p - expf(rough[t] - max) : 0.0f;
        score[t]         = p;
        rough[t]         = more;
        sum += more;
    }
    for (int f = xkv_cu_lane(); f < c.n_fine(); f += XKV_CU_WARP) {
        if (c.fine[i] >> f & 1) {
            share[f] = -INFINITY;
        }
    }
    sum = xkv_cu_sum(sum);
    if (xkv_cu_lane() == 0) {
        const float f = xkv_cu_rescale(old, max);
        c.factor[i]   = f;
        c.held[i]     = c.have[i];
        c.have[i]     = 2;
        c.max[i]      = max;
        c.sum[i]      = c.sum[i] * f + sum;
    }
}

// grid: split, tile of queries, stream
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_lead(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int n_most) {
    XKV_DYNAMIC_SHARED(shared);
    const int j0    = blockIdx.y * n_most;
    const int split = blockIdx.x;

    xkv_cu_arena       arena = { (char *) shared };
    const xkv_cu_chunk c(a, b, blockIdx.z, j0, min(n_most, b.n_query - j0), false, arena);
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        c.max[i]  = -INFINITY;
        c.sum[i]  = 0.0f;
        c.have[i] = 0;
    }
    for (int ic = split; ic < a.n_frame; ic += b.n_split) {
        xkv_cu_load_fill(c, ic);
        __syncthreads();
        c.turn(ic);
        __syncthreads();
        c.add_directions(ic, 0, a.lead[XKV_CU_K]);
        for (int i = xkv_cu_warp(); i < c.n; i += xkv_cu_n_warp()) {
            xkv_cu_weigh_lead(c, ic, i);
        }
        __syncthreads();
        c.add_values(ic, split, c.score, c.score, a.lead[XKV_CU_V]);
        __syncthreads();
    }
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        b.state[b.part(c.s, split, j0 + i)] = make_float4(c.max[i], c.sum[i], 0.0f, 0.0f);
    }
}

// sets which blocks of a chunk are refined; by a warp for a query
static __device__ bool xkv_cu_mark(const xkv_cu_chunk & c, int ic) {
    bool any = false;
    for (int i = xkv_cu_warp(); i < c.n; i += xkv_cu_n_warp()) {
        const float * share = c.share(i) + ic * c.n_fine();
        const float   least = c.b.least[(size_t) c.s * c.b.n_query + c.j0 + i].y;
        const int     f     = xkv_cu_lane();
        const bool    on    = f < c.n_fine() && share[f] > least;
        const auto    bits  = __ballot_sync(XKV_CU_ALL, on);
        if (f == 0) {
            c.fine[i] = bits;
            c.fill[i] = bits ? xkv_cu_n_fill(c.a, ic, xkv_cu_find_query(c.a, c.j0 + i).token, c.s) : 0;
        }
        any = any || bits;
    }
    return any;
}

// as xkv_cu_lead, for blocks beyond the least share
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_refine(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int n_most) {
    XKV_DYNAMIC_SHARED(shared);
    const int j0    = blockIdx.y * n_most;
    const int split = blockIdx.x;

    xkv_cu_arena       arena = { (char *) shared };
    const xkv_cu_chunk c(a, b, blockIdx.z, j0, min(n_most, b.n_query - j0), true, arena);
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        const float4 state = b.state[b.part(c.s, split, j0 + i)];
        c.max[i]           = state.x;
        c.sum[i]           = state.y;
        c.have[i]          = state.z > 0.0f ? 2 : 1;
    }
    for (int ic = split; ic < a.n_frame; ic += b.n_split) {
        if (!__syncthreads_or(xkv_cu_mark(c, ic))) {
            continue;
        }
        c.turn(ic);
        __syncthreads();
        c.add_directions(ic, 0, a.lead[XKV_CU_K]);
        c.keep_rough();
        c.add_directions(ic, a.lead[XKV_CU_K], a.rank[XKV_CU_K]);
        for (int i = xkv_cu_warp(); i < c.n; i += xkv_cu_n_warp()) {
            xkv_cu_weigh_fine(c, ic, i);
        }
        __syncthreads();
        c.add_values(ic, split, c.rough, c.score, a.rank[XKV_CU_V]);
        __syncthreads();
    }
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        b.state[b.part(c.s, split, j0 + i)] = make_float4(c.max[i], c.sum[i], c.have[i] == 2 ? 1.0f : 0.0f, 0.0f);
    }
}

// by a warp: max and sum of a query's weights over all parts
static __device__ float2 xkv_cu_total(const xkv_cu_decode & b, int s, int j) {
    float max = -INFINITY;
    for (int k = xkv_cu_lane(); k < b.n_split; k += XKV_CU_WARP) {
        max = fmaxf(max, b.state[b.part(s, k, j)].x);
    }
    for (int k = xkv_cu_lane(); k < b.n_span; k += XKV_CU_WARP) {
        max = fmaxf(max, b.exact_state[b.span(s, k, j)].x);
    }
    max       = xkv_cu_max(max);
    float sum = 0.0f;
    for (int k = xkv_cu_lane(); k < b.n_split; k += XKV_CU_WARP) {
        const float4 state = b.state[b.part(s, k, j)];
        sum += xkv_cu_rescale(state.x, max) * state.y;
    }
    for (int k = xkv_cu_lane(); k < b.n_span; k += XKV_CU_WARP) {
        const float2 state = b.exact_state[b.span(s, k, j)];
        sum += xkv_cu_rescale(state.x, max) * state.y;
    }
    return make_float2(max, xkv_cu_sum(sum));
}

// which blocks a round refines; grid: query, stream; one warp
static __global__ void xkv_cu_least(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int round) {
    const int    j     = blockIdx.x;
    const int    s     = blockIdx.y;
    const float2 total = xkv_cu_total(b, s, j);
    float2 *     least = b.least + (size_t) s * b.n_query + j;
    if (xkv_cu_lane() == 0) {
        const float now = total.y > 0.0f ? logf(total.y * a.tolerance) + total.x : INFINITY;
        const float old = round == 0 ? INFINITY : least->x;
        *least          = now < old - XKV_CU_ROUND_LESS ? make_float2(now, now) : make_float2(old, INFINITY);
    }
}

// sums of all parts of a query, through the basis of V; grid: query, stream
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_merge(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b) {
    XKV_DYNAMIC_SHARED(shared);
    const int j    = blockIdx.x;
    const int s    = blockIdx.y;
    const int dv   = a.dim[XKV_CU_V];
    const int rank = a.rank[XKV_CU_V];

    xkv_cu_arena arena = { (char *) shared };
    float *      z     = arena.take<float>(rank);
    float *      o     = arena.take<float>(dv);

    const float2 total = xkv_cu_total(b, s, j);
    for (int r = threadIdx.x; r < rank; r += blockDim.x) {
        float sum = 0.0f;
        for (int k = 0; k < b.n_split; ++k) {
            const float4 state = b.state[b.part(s, k, j)];
            if (state.x > -INFINITY && (r < a.lead[XKV_CU_V] || state.z > 0.0f)) {
                sum += expf(state.x - total.x) * b.sums[b.part(s, k, j) * rank + r];
            }
        }
        z[r] = sum;
    }
    for (int d = threadIdx.x; d < dv; d += blockDim.x) {
        float sum = 0.0f;
        for (int k = 0; k < b.n_span; ++k) {
            const float2 state = b.exact_state[b.span(s, k, j)];
            if (state.x > -INFINITY) {
                sum += expf(state.x - total.x) * b.exact[b.span(s, k, j) * dv + d];
            }
        }
        o[d] = sum;
    }
    __syncthreads();
    const xkv_cu_query at    = xkv_cu_find_query(a, j);
    const float        scale = total.y > 0.0f ? 1.0f / total.y : 0.0f;
    float *            out   = a.dst + ((size_t) s * b.n_query + at.out) * dv;
    for (int d = xkv_cu_warp() * 16; d < dv; d += xkv_cu_n_warp() * 16) {
        float acc[XKV_CU_VECS] = {};
        for (int is = 0; is < a.n_segment[XKV_CU_V] && b.n_split > 0 && !a.plain; ++is) {
            const xkv_cu_segment & seg  = a.segments[XKV_CU_V][is];
            const uint8_t *        base = a.basis + a.kind_basis[XKV_CU_V] + at.head * a.head_basis[XKV_CU_V] + seg.basis;
            xkv_cu_dot(seg.type_basis, base + d / 16 * xkv_cu_rows_bytes(seg.type_basis, seg.rank), seg.rank, z + seg.first, rank, 1, acc);
        }
        xkv_cu_both(1, acc);
        const int i = d + xkv_cu_lane();
        if (xkv_cu_lane() < 16) {
            out[i] = (o[i] + acc[0] + (a.plain && b.n_split > 0 ? z[i] : 0.0f)) * scale;
        }
    }
}
