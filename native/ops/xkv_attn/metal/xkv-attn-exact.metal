// Few queries and exact tokens, in spans whose sums stand apart.

#include "xkv-mtl-decode.h"

// numbers of a head that a thread sums
#define XKV_MTL_EXACT_OWN    (XKV_MTL_MAX_HEAD / XKV_MTL_EXACT_THREADS)
#define XKV_MTL_EXACT_N_WARP (XKV_MTL_EXACT_THREADS / XKV_MTL_WARP)

struct xkv_mtl_exact {
    int s, head, n; // vectors

    threadgroup float * q; // see xkv_mtl_exact_layout
    threadgroup float * score;
    threadgroup float * max;
    threadgroup float * sum;
    threadgroup float * factor;
};

// by a SIMD group: scores of token k of the block
static inline void xkv_mtl_exact_score(thread const xkv_mtl_in & in, thread const xkv_mtl_exact & c, device const char * row, int k) {
    float acc[XKV_MTL_VECS] = { 0.0f };
    for (int d = in.lane; d < fc_dim_k; d += XKV_MTL_WARP) {
        const float x = xkv_mtl_exact_at(fc_exact_k, row, d);
        XKV_MTL_UNROLL
        for (int i = 0; i < XKV_MTL_VECS; ++i) {
            if (i < c.n) {
                acc[i] += x * c.q[i * fc_dim_k + d];
            }
        }
    }
    XKV_MTL_UNROLL
    for (int i = 0; i < XKV_MTL_VECS; ++i) {
        if (i < c.n) {
            acc[i] = simd_sum(acc[i]);
            if (in.lane == 0) {
                // it holds the mask
                c.score[i * XKV_MTL_EXACT_BLOCK + k] += xkv_mtl_cap(acc[i], in.a->softcap);
            }
        }
    }
}

// by a SIMD group: weights of a block's tokens for vector i
static inline void xkv_mtl_exact_weigh(thread const xkv_mtl_in & in, thread const xkv_mtl_exact & c, int i) {
    threadgroup float * score = c.score + i * XKV_MTL_EXACT_BLOCK + in.lane;
    const float         x     = *score;
    const float         old   = c.max[i];
    const float         most  = max(old, simd_max(x));
    const float         p     = xkv_mtl_seen(x) ? exp(x - most) : 0.0f;
    const float         sum   = simd_sum(p);

    *score = p;
    if (in.lane == 0) {
        c.factor[i] = xkv_mtl_rescale(old, most);
        c.max[i]    = most;
        c.sum[i]    = c.sum[i] * c.factor[i] + sum;
    }
}

// grid: span, queries of a KV head, stream
kernel void kernel_xkv_attn_exact(XKV_MTL_PARAMS) {
    const xkv_mtl_in in      = XKV_MTL_IN;
    const int        m       = a.n_tps * fc_n_gqa;
    const int        n_unit  = (m + XKV_MTL_VECS - 1) / XKV_MTL_VECS;
    const int        first   = in.block[1] % n_unit * XKV_MTL_VECS;
    const int        n_token = step.n;
    const int        begin   = in.block[0] * n_token;
    const int        end     = min(a.n_exact, begin + n_token);

    const xkv_mtl_exact_layout l   = xkv_mtl_lay_out_exact(fc_dim_k);
    threadgroup int *          any = xkv_mtl_piece<int>(in, l.any, XKV_MTL_EXACT_N_WARP);

    xkv_mtl_exact c;
    c.s      = in.block[2];
    c.head   = in.block[1] / n_unit;
    c.n      = min(XKV_MTL_VECS, m - first);
    c.q      = xkv_mtl_piece<float>(in, l.q, XKV_MTL_VECS * fc_dim_k);
    c.score  = xkv_mtl_piece<float>(in, l.score, XKV_MTL_VECS * XKV_MTL_EXACT_BLOCK);
    c.max    = xkv_mtl_piece<float>(in, l.max, XKV_MTL_VECS);
    c.sum    = xkv_mtl_piece<float>(in, l.sum, XKV_MTL_VECS);
    c.factor = xkv_mtl_piece<float>(in, l.factor, XKV_MTL_VECS);

    const int j0 = c.head * m + first;
    for (int i = 0; i < c.n; ++i) {
        device const float * x = xkv_mtl_query_row(in, xkv_mtl_find_query(a, j0 + i), j0 + i, c.s);
        for (int d = in.thread_index; d < fc_dim_k; d += XKV_MTL_EXACT_THREADS) {
            c.q[i * fc_dim_k + d] = x[d] * a.scale;
        }
    }
    if (in.thread_index < c.n) {
        c.max[in.thread_index] = XKV_MTL_NONE;
        c.sum[in.thread_index] = 0.0f;
    }
    float acc[XKV_MTL_EXACT_OWN][XKV_MTL_VECS] = { { 0.0f } };
    for (int k0 = begin; k0 < end; k0 += XKV_MTL_EXACT_BLOCK) {
        const int n_k  = min(XKV_MTL_EXACT_BLOCK, end - k0);
        bool      some = false;
        for (int e = in.thread_index; e < c.n * XKV_MTL_EXACT_BLOCK; e += XKV_MTL_EXACT_THREADS) {
            const int   i    = e % XKV_MTL_EXACT_BLOCK;
            const int   t    = (first + e / XKV_MTL_EXACT_BLOCK) / fc_n_gqa;
            const float bias = i < n_k ? xkv_mtl_mask_at(in, k0 + i, t, c.s) : XKV_MTL_NONE;
            c.score[e]       = bias;
            some             = some || xkv_mtl_seen(bias);
        }
        if (!xkv_mtl_any(some, in, any, XKV_MTL_EXACT_N_WARP)) {
            continue;
        }
        for (int i = in.warp; i < n_k; i += XKV_MTL_EXACT_N_WARP) {
            xkv_mtl_exact_score(in, c, xkv_mtl_exact_row(in, XKV_MTL_K, k0 + i, c.head, c.s), i);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = in.warp; i < c.n; i += XKV_MTL_EXACT_N_WARP) {
            xkv_mtl_exact_weigh(in, c, i);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        XKV_MTL_UNROLL
        for (int o = 0; o < XKV_MTL_EXACT_OWN; ++o) {
            const int d = in.thread_index + o * XKV_MTL_EXACT_THREADS;
            if (d >= fc_dim_v) {
                break;
            }
            XKV_MTL_UNROLL
            for (int i = 0; i < XKV_MTL_VECS; ++i) {
                acc[o][i] *= i < c.n ? c.factor[i] : 0.0f;
            }
            for (int t = 0; t < n_k; ++t) {
                const float x = xkv_mtl_exact_at(fc_exact_v, xkv_mtl_exact_row(in, XKV_MTL_V, k0 + t, c.head, c.s), d);
                XKV_MTL_UNROLL
                for (int i = 0; i < XKV_MTL_VECS; ++i) {
                    if (i < c.n) {
                        acc[o][i] += c.score[i * XKV_MTL_EXACT_BLOCK + t] * x;
                    }
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    XKV_MTL_UNROLL
    for (int i = 0; i < XKV_MTL_VECS; ++i) {
        if (i >= c.n) {
            break;
        }
        if (in.thread_index == 0) {
            *xkv_mtl_exact_state(in, c.s, in.block[0], j0 + i) = float2(c.max[i], c.sum[i]);
        }
        device float * out = xkv_mtl_scratch<float>(in, a.at_exact) + xkv_mtl_span(a, c.s, in.block[0], j0 + i) * fc_dim_v;
        XKV_MTL_UNROLL
        for (int o = 0; o < XKV_MTL_EXACT_OWN; ++o) {
            const int d = in.thread_index + o * XKV_MTL_EXACT_THREADS;
            if (d < fc_dim_v) {
                out[d] = acc[o][i];
            }
        }
    }
}
