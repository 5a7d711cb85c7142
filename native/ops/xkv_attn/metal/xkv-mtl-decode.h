// Few queries on Metal. A first pass counts all stored tokens by the lead and keeps the share of each block of 16; then each query's
// softmax has a size, and blocks with more than the tolerance of it are counted again with all directions.

#pragma once

#include "xkv-mtl-chunk.h"

// by how much, as a logarithm, a query's softmax has to become smaller for another round
#define XKV_MTL_ROUND_LESS 0.5f

static inline void xkv_mtl_load_fill(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic) {
    for (int i = in.thread_index; i < c.n; i += XKV_MTL_THREADS) {
        c.fill[i] = xkv_mtl_n_fill(in, ic, xkv_mtl_find_query(*in.a, c.j0 + i).token, c.s);
        c.fine[i] = (1u << ((c.fill[i] + XKV_MTL_FINE - 1) / XKV_MTL_FINE)) - 1;
    }
}

// what a query has with a chunk; the first lane writes it
static inline void xkv_mtl_keep_sums(thread const xkv_mtl_chunk & c, int i, float old, float max, float sum, int have) {
    const float f = xkv_mtl_rescale(old, max);
    c.factor[i]   = f;
    c.held[i]     = c.have[i];
    c.have[i]     = have;
    c.max[i]      = max;
    c.sum[i]      = c.sum[i] * f + sum;
}

// by a SIMD group: weights of all tokens of a chunk for query i, and the shares of its blocks
static inline void xkv_mtl_weigh_lead(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic, int i) {
    threadgroup float * score = c.score + i * fc_n_chunk;
    device float *      share = xkv_mtl_share(in, c, i) + ic * xkv_mtl_n_fine();
    if (c.fine[i] == 0) {
        for (int f = in.lane; f < xkv_mtl_n_fine(); f += XKV_MTL_WARP) {
            share[f] = XKV_MTL_NONE;
        }
        return;
    }
    const float old  = c.max[i];
    const int   fill = c.fill[i];
    float       most = old;
    for (int t = in.lane; t < fill; t += XKV_MTL_WARP) {
        score[t] = xkv_mtl_cap(score[t], in.a->softcap);
        most     = max(most, score[t]);
    }
    most      = simd_max(most);
    float sum = 0.0f;
    for (int t = in.lane; t < fc_n_chunk; t += XKV_MTL_WARP) {
        const float p = t < fill ? exp(score[t] - most) : 0.0f;
        score[t]      = p;
        sum += p;
        const float part = xkv_mtl_sum_fine(p);
        if (t % XKV_MTL_FINE == 0) {
            share[t / XKV_MTL_FINE] = part > 0.0f ? log(part) + most : XKV_MTL_NONE;
        }
    }
    sum = simd_sum(sum);
    if (in.lane == 0) {
        xkv_mtl_keep_sums(c, i, old, most, sum, 1);
    }
}

// scores by the lead; each thread keeps those that it weighs
static inline void xkv_mtl_keep_rough(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c) {
    for (int i = in.warp; i < c.n; i += XKV_MTL_N_WARP) {
        for (int t = in.lane; t < fc_n_chunk; t += XKV_MTL_WARP) {
            c.rough[i * fc_n_chunk + t] = c.score[i * fc_n_chunk + t];
        }
    }
}

// by a SIMD group: weights of blocks that are refined, in score, and in rough what they have more than by the lead
static inline void xkv_mtl_weigh_fine(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic, int i) {
    const uint fine = c.fine[i];
    if (fine == 0) {
        return;
    }
    threadgroup float * score = c.score + i * fc_n_chunk;
    threadgroup float * rough = c.rough + i * fc_n_chunk;
    device float *      share = xkv_mtl_share(in, c, i) + ic * xkv_mtl_n_fine();

    const float cap  = in.a->softcap;
    const float old  = c.max[i];
    const int   fill = c.fill[i];
    float       most = old;
    for (int t = in.lane; t < fill; t += XKV_MTL_WARP) {
        if (((fine >> (t / XKV_MTL_FINE)) & 1) != 0) {
            score[t] = xkv_mtl_cap(score[t], cap);
            most     = max(most, score[t]);
        }
    }
    most      = simd_max(most);
    float sum = 0.0f;
    for (int t = in.lane; t < fc_n_chunk; t += XKV_MTL_WARP) {
        const bool  on   = t < fill && ((fine >> (t / XKV_MTL_FINE)) & 1) != 0;
        const float p    = on ? exp(score[t] - most) : 0.0f;
        const float more = on ? p - exp(xkv_mtl_cap(rough[t], cap) - most) : 0.0f;
        score[t]         = p;
        rough[t]         = more;
        sum += more;
    }
    for (int f = in.lane; f < xkv_mtl_n_fine(); f += XKV_MTL_WARP) {
        if (((fine >> f) & 1) != 0) {
            share[f] = XKV_MTL_NONE;
        }
    }
    sum = simd_sum(sum);
    if (in.lane == 0) {
        xkv_mtl_keep_sums(c, i, old, most, sum, 2);
    }
}

static inline device float4 * xkv_mtl_state(thread const xkv_mtl_in & in, int s, int split, int j) {
    return xkv_mtl_scratch<float4>(in, in.a->at_state) + xkv_mtl_part(*in.a, s, split, j);
}

static inline device float2 * xkv_mtl_exact_state(thread const xkv_mtl_in & in, int s, int span, int j) {
    return xkv_mtl_scratch<float2>(in, in.a->at_exact_state) + xkv_mtl_span(*in.a, s, span, j);
}

static inline device float2 * xkv_mtl_least(thread const xkv_mtl_in & in, int s, int j) {
    return xkv_mtl_scratch<float2>(in, in.a->at_least) + (uint64_t) s * in.a->n_query + j;
}

// sets which blocks of a chunk are refined; by a SIMD group for a query
static inline bool xkv_mtl_mark(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic) {
    bool some = false;
    for (int i = in.warp; i < c.n; i += XKV_MTL_N_WARP) {
        device const float * share = xkv_mtl_share(in, c, i) + ic * xkv_mtl_n_fine();
        const float          least = (*xkv_mtl_least(in, c.s, c.j0 + i))[1];
        const bool           on    = in.lane < xkv_mtl_n_fine() && share[in.lane] > least;
        const uint           bits  = simd_or(on ? 1u << in.lane : 0u);
        if (in.lane == 0) {
            c.fine[i] = bits;
            c.fill[i] = bits != 0 ? xkv_mtl_n_fill(in, ic, xkv_mtl_find_query(*in.a, c.j0 + i).token, c.s) : 0;
        }
        some = some || bits != 0;
    }
    return some;
}

// by a SIMD group: max and sum of a query's weights over all parts
static inline float2 xkv_mtl_total(thread const xkv_mtl_in & in, int s, int j) {
    constant xkv_mtl_args & a    = *in.a;
    float                   most = XKV_MTL_NONE;
    if (a.has_sinks != 0) {
        most = in.sinks[xkv_mtl_head_of(xkv_mtl_find_query(a, j), j)];
    }
    const float sink = most;
    for (int i = in.lane; i < a.n_split; i += XKV_MTL_WARP) {
        most = max(most, (*xkv_mtl_state(in, s, i, j))[0]);
    }
    for (int i = in.lane; i < a.n_span; i += XKV_MTL_WARP) {
        most = max(most, (*xkv_mtl_exact_state(in, s, i, j))[0]);
    }
    most      = simd_max(most);
    float sum = 0.0f;
    for (int i = in.lane; i < a.n_split; i += XKV_MTL_WARP) {
        const float4 state = *xkv_mtl_state(in, s, i, j);
        sum += xkv_mtl_rescale(state[0], most) * state[1];
    }
    for (int i = in.lane; i < a.n_span; i += XKV_MTL_WARP) {
        const float2 state = *xkv_mtl_exact_state(in, s, i, j);
        sum += xkv_mtl_rescale(state[0], most) * state[1];
    }
    return float2(most, simd_sum(sum) + xkv_mtl_rescale(sink, most));
}
