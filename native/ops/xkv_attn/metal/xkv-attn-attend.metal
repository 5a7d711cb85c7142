// Many queries: how they meet a batch of tokens whose K and V are made. A query keeps a running max and sum; its output is where the
// sums of V are.

#include "xkv-mtl-query.h"

#define XKV_MTL_ATTEND_N_WARP (XKV_MTL_THREADS / XKV_MTL_WARP)

struct xkv_mtl_rows {
    int s, head, j0, n; // queries of the KV head

    threadgroup float * score; // see xkv_mtl_attend_layout
    threadgroup float * panel;
    threadgroup float * part;
    threadgroup float * max;
    threadgroup float * sum;
    threadgroup float * factor;
};

// what is added to the score of token t of the batch for row i
static inline float xkv_mtl_bias(thread const xkv_mtl_in & in, thread const xkv_mtl_rows & c, int i, int t) {
    constant xkv_mtl_step & step  = *in.step;
    const int               token = (c.j0 + i) / fc_n_gqa;
    if (i >= c.n || t >= step.n_token) {
        return XKV_MTL_NONE;
    }
    if (step.stored == 0) {
        return xkv_mtl_mask_at(in, step.first + t, token, c.s);
    }
    const int at = step.first + t;
    return at % fc_n_chunk < xkv_mtl_n_fill(in, at / fc_n_chunk, token, c.s) ? 0.0f : XKV_MTL_NONE;
}

// whether this thread's row and some of the tokens [t0, t0 + XKV_MTL_SPAN) see each other
static inline bool xkv_mtl_some_seen(thread const xkv_mtl_in & in, thread const xkv_mtl_rows & c, int t0) {
    // a chunk's first token is seen where any of it is, and chunks have 32 tokens at least
    const int each = in.step->stored != 0 ? XKV_MTL_WARP : 1;
    bool      some = false;
    for (int e = in.thread_index; e < XKV_MTL_ROWS * XKV_MTL_SPAN / each; e += XKV_MTL_THREADS) {
        const int i = e / (XKV_MTL_SPAN / each);
        const int t = t0 + e % (XKV_MTL_SPAN / each) * each;
        some        = some || xkv_mtl_seen(xkv_mtl_bias(in, c, i, t));
    }
    return some;
}

// queries times K; where K has not been made nobody sees it
static inline void xkv_mtl_score(thread const xkv_mtl_in & in, thread const xkv_mtl_rows & c, int t0) {
    constant xkv_mtl_args & a   = *in.a;
    device const float *    k   = xkv_mtl_scratch<float>(in, a.at_k) + ((uint64_t) c.head * XKV_MTL_BATCH + t0) * fc_dim_k;
    const int               col = in.warp * XKV_MTL_PART; // a SIMD group has all rows by 16 tokens
    simdgroup_float8x8      acc[4][2];
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
            acc[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }
    for (int d = 0; d < fc_dim_k; d += XKV_MTL_DEPTH) {
        const int depth = min(XKV_MTL_DEPTH, fc_dim_k - d);
        for (int e = in.thread_index; e < XKV_MTL_ROWS * XKV_MTL_DEPTH; e += XKV_MTL_THREADS) {
            const int i = e / XKV_MTL_DEPTH;
            const int r = e % XKV_MTL_DEPTH;
            float     x = 0.0f;
            if (i < c.n && r < depth) {
                const int j = c.head * a.n_tps * fc_n_gqa + c.j0 + i;
                x           = xkv_mtl_query_row(in, xkv_mtl_find_query(a, j), j, c.s)[d + r] * a.scale;
            }
            c.panel[i * XKV_MTL_LD_PANEL + r] = x;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int e = 0; e < depth; e += 8) {
            simdgroup_float8x8 x[4], y[2];
            XKV_MTL_UNROLL
            for (int i = 0; i < 4; ++i) {
                simdgroup_load(x[i], c.panel + 8 * i * XKV_MTL_LD_PANEL + e, XKV_MTL_LD_PANEL);
            }
            XKV_MTL_UNROLL
            for (int j = 0; j < 2; ++j) {
                simdgroup_load(y[j], k + (col + 8 * j) * fc_dim_k + d + e, fc_dim_k, 0, true);
            }
            XKV_MTL_UNROLL
            for (int i = 0; i < 4; ++i) {
                XKV_MTL_UNROLL
                for (int j = 0; j < 2; ++j) {
                    simdgroup_multiply_accumulate(acc[i][j], x[i], y[j], acc[i][j]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 2; ++j) {
            simdgroup_store(acc[i][j], c.score + 8 * i * XKV_MTL_LD_SPAN + col + 8 * j, XKV_MTL_LD_SPAN);
        }
    }
}

// by a SIMD group: weights of row i
static inline void xkv_mtl_weigh(thread const xkv_mtl_in & in, thread const xkv_mtl_rows & c, int i, int t0) {
    threadgroup float * score = c.score + i * XKV_MTL_LD_SPAN;
    float               x[XKV_MTL_SPAN / XKV_MTL_WARP];
    const float         old  = c.max[i];
    float               most = old;
    XKV_MTL_UNROLL
    for (int e = 0; e < XKV_MTL_SPAN / XKV_MTL_WARP; ++e) {
        const int   t    = in.lane + XKV_MTL_WARP * e;
        const float bias = xkv_mtl_bias(in, c, i, t0 + t);
        x[e]             = xkv_mtl_seen(bias) ? xkv_mtl_cap(score[t], in.a->softcap) + bias : XKV_MTL_NONE;
        most             = max(most, x[e]);
    }
    most      = simd_max(most);
    float sum = 0.0f;
    XKV_MTL_UNROLL
    for (int e = 0; e < XKV_MTL_SPAN / XKV_MTL_WARP; ++e) {
        const float p                     = xkv_mtl_seen(x[e]) ? exp(x[e] - most) : 0.0f;
        score[in.lane + XKV_MTL_WARP * e] = p;
        sum += p;
    }
    sum = simd_sum(sum);
    if (in.lane == 0) {
        c.factor[i] = xkv_mtl_rescale(old, most);
        c.max[i]    = most;
        c.sum[i]    = c.sum[i] * c.factor[i] + sum;
    }
}

// adds weights times V to the output: a SIMD group has 16 rows by 16 numbers at a time
static inline void xkv_mtl_add(thread const xkv_mtl_in & in, thread const xkv_mtl_rows & c, int t0) {
    constant xkv_mtl_args & a   = *in.a;
    device const float *    v   = xkv_mtl_scratch<float>(in, a.at_v) + ((uint64_t) c.head * XKV_MTL_BATCH + t0) * fc_dim_v;
    threadgroup float *     own = c.part + in.warp * XKV_MTL_PART * XKV_MTL_LD_PART;
    const int               end = min(XKV_MTL_SPAN, in.step->n_token - t0);
    const int               n   = fc_dim_v / XKV_MTL_PART;
    for (int item = in.warp; item < XKV_MTL_ROWS / XKV_MTL_PART * n; item += XKV_MTL_ATTEND_N_WARP) {
        const int          row = item / n * XKV_MTL_PART;
        const int          col = item % n * XKV_MTL_PART;
        simdgroup_float8x8 acc[2][2];
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 2; ++j) {
                acc[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
            }
        }
        for (int t = 0; t < end; t += 8) {
            simdgroup_float8x8 x[2], y[2];
            XKV_MTL_UNROLL
            for (int i = 0; i < 2; ++i) {
                simdgroup_load(x[i], c.score + (row + 8 * i) * XKV_MTL_LD_SPAN + t, XKV_MTL_LD_SPAN);
                simdgroup_load(y[i], v + t * fc_dim_v + col + 8 * i, fc_dim_v);
            }
            XKV_MTL_UNROLL
            for (int i = 0; i < 2; ++i) {
                XKV_MTL_UNROLL
                for (int j = 0; j < 2; ++j) {
                    simdgroup_multiply_accumulate(acc[i][j], x[i], y[j], acc[i][j]);
                }
            }
        }
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 2; ++j) {
                simdgroup_store(acc[i][j], own + 8 * i * XKV_MTL_LD_PART + 8 * j, XKV_MTL_LD_PART);
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        for (int e = in.lane; e < XKV_MTL_PART * XKV_MTL_PART; e += XKV_MTL_WARP) {
            const int i = row + e / XKV_MTL_PART;
            if (i < c.n) {
                const int      j   = c.head * a.n_tps * fc_n_gqa + c.j0 + i;
                device float * out = in.dst + ((uint64_t) c.s * a.n_head * a.n_tps + xkv_mtl_find_query(a, j).out) * fc_dim_v;
                const int      d   = col + e % XKV_MTL_PART;
                out[d]             = out[d] * c.factor[i] + own[e / XKV_MTL_PART * XKV_MTL_LD_PART + e % XKV_MTL_PART];
            }
        }
        XKV_MTL_SIMD_ORDER();
    }
}

static inline device float2 * xkv_mtl_query_total(thread const xkv_mtl_in & in, int j) {
    return xkv_mtl_scratch<float2>(in, in.a->at_total) + j;
}

// grid: queries of a KV head, KV head
kernel void kernel_xkv_attn_attend(XKV_MTL_PARAMS) {
    const xkv_mtl_in            in  = XKV_MTL_IN;
    const xkv_mtl_attend_layout l   = xkv_mtl_lay_out_attend();
    threadgroup int *           any = xkv_mtl_piece<int>(in, l.any, XKV_MTL_ATTEND_N_WARP);

    xkv_mtl_rows c;
    c.s      = step.stream;
    c.head   = in.block[1];
    c.j0     = in.block[0] * XKV_MTL_ROWS;
    c.n      = min(XKV_MTL_ROWS, a.n_tps * fc_n_gqa - c.j0);
    c.score  = xkv_mtl_piece<float>(in, l.score, XKV_MTL_ROWS * XKV_MTL_LD_SPAN);
    c.panel  = xkv_mtl_piece<float>(in, l.panel, XKV_MTL_ROWS * XKV_MTL_LD_PANEL);
    c.part   = xkv_mtl_piece<float>(in, l.part, XKV_MTL_ATTEND_N_WARP * XKV_MTL_PART * XKV_MTL_LD_PART);
    c.max    = xkv_mtl_piece<float>(in, l.max, XKV_MTL_ROWS);
    c.sum    = xkv_mtl_piece<float>(in, l.sum, XKV_MTL_ROWS);
    c.factor = xkv_mtl_piece<float>(in, l.factor, XKV_MTL_ROWS);

    device float2 * total = xkv_mtl_query_total(in, c.head * a.n_tps * fc_n_gqa + c.j0);
    if (in.thread_index < XKV_MTL_ROWS) {
        const float2 state     = in.thread_index < c.n ? total[in.thread_index] : float2(XKV_MTL_NONE, 0.0f);
        c.max[in.thread_index] = state[0];
        c.sum[in.thread_index] = state[1];
    }
    for (int t0 = 0; t0 < step.n_token; t0 += XKV_MTL_SPAN) {
        if (!xkv_mtl_any(xkv_mtl_some_seen(in, c, t0), in, any, XKV_MTL_ATTEND_N_WARP)) {
            continue;
        }
        xkv_mtl_score(in, c, t0);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = in.warp; i < XKV_MTL_ROWS; i += XKV_MTL_ATTEND_N_WARP) {
            xkv_mtl_weigh(in, c, i, t0);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add(in, c, t0); // the next span writes nothing that this reads before xkv_mtl_any's barriers
    }
    if (in.thread_index < c.n) {
        total[in.thread_index] = float2(c.max[in.thread_index], c.sum[in.thread_index]);
    }
}

// grid: query
kernel void kernel_xkv_attn_begin(XKV_MTL_PARAMS) {
    const xkv_mtl_in    in = XKV_MTL_IN;
    const int           j  = in.block[0];
    const xkv_mtl_query at = xkv_mtl_find_query(a, j);
    if (in.lane == 0) {
        *xkv_mtl_query_total(in, j) = a.has_sinks != 0 ? float2(in.sinks[xkv_mtl_head_of(at, j)], 1.0f) : float2(XKV_MTL_NONE, 0.0f);
    }
    device float * out = in.dst + ((uint64_t) step.stream * a.n_head * a.n_tps + at.out) * fc_dim_v;
    for (int d = in.lane; d < fc_dim_v; d += XKV_MTL_WARP) {
        out[d] = 0.0f;
    }
}

// grid: query
kernel void kernel_xkv_attn_end(XKV_MTL_PARAMS) {
    const xkv_mtl_in in  = XKV_MTL_IN;
    const int        j   = in.block[0];
    const float      sum = (*xkv_mtl_query_total(in, j))[1];
    device float *   out = in.dst + ((uint64_t) step.stream * a.n_head * a.n_tps + xkv_mtl_find_query(a, j).out) * fc_dim_v;
    for (int d = in.lane; d < fc_dim_v; d += XKV_MTL_WARP) {
        out[d] = sum > 0.0f ? out[d] / sum : 0.0f;
    }
}
