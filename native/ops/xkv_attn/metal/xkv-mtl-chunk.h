// Few queries on Metal: what the pass by the lead and the refinement share. A threadgroup has some queries and every n_split-th chunk.

#pragma once

#include "xkv-mtl-query.h"

// up to XKV_MTL_VECS queries of a threadgroup that a SIMD group takes together
struct xkv_mtl_unit {
    int  head; // KV head, if they are of one
    int  first;
    uint mask;
};

struct xkv_mtl_chunk {
    int s, j0, n;

    threadgroup float * q; // see xkv_mtl_chunk_layout
    threadgroup float * y;
    threadgroup float * score;
    threadgroup float * rough;
    threadgroup float * max;
    threadgroup float * sum;
    threadgroup float * factor;
    threadgroup int *   have;
    threadgroup int *   held;
    threadgroup int *   fill;
    threadgroup uint *  fine;
    threadgroup int *   any;
};

#define XKV_MTL_N_WARP (XKV_MTL_THREADS / XKV_MTL_WARP)

static inline xkv_mtl_chunk xkv_mtl_make_chunk(thread const xkv_mtl_in & in, bool refine) {
    const int most = in.step->n;

    xkv_mtl_chunk c;
    c.s  = in.block[2];
    c.j0 = in.block[1] * most;
    c.n  = min(most, in.a->n_query - c.j0);

    const xkv_mtl_chunk_layout l = xkv_mtl_lay_out_chunk(most, fc_dim_k, fc_n_chunk, refine);

    c.q      = xkv_mtl_piece<float>(in, l.q, most * fc_dim_k);
    c.y      = xkv_mtl_piece<float>(in, l.y, most * XKV_MTL_SLICE);
    c.score  = xkv_mtl_piece<float>(in, l.score, most * fc_n_chunk);
    c.rough  = xkv_mtl_piece<float>(in, l.rough, refine ? most * fc_n_chunk : 0);
    c.max    = xkv_mtl_piece<float>(in, l.max, most);
    c.sum    = xkv_mtl_piece<float>(in, l.sum, most);
    c.factor = xkv_mtl_piece<float>(in, l.factor, most);
    c.have   = xkv_mtl_piece<int>(in, l.have, most);
    c.held   = xkv_mtl_piece<int>(in, l.held, most);
    c.fill   = xkv_mtl_piece<int>(in, l.fill, most);
    c.fine   = xkv_mtl_piece<uint>(in, l.fine, most);
    c.any    = xkv_mtl_piece<int>(in, l.any, XKV_MTL_N_WARP);
    return c;
}

static inline int xkv_mtl_n_fine() {
    return fc_n_chunk / XKV_MTL_FINE;
}

// logs of the sums of weights of a query's blocks
static inline device float * xkv_mtl_share(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int i) {
    constant xkv_mtl_args & a = *in.a;
    return xkv_mtl_scratch<float>(in, a.at_share) + ((uint64_t) c.s * a.n_query + c.j0 + i) * a.n_frame * xkv_mtl_n_fine();
}

static inline uint64_t xkv_mtl_part(constant xkv_mtl_args & a, int s, int split, int j) {
    return ((uint64_t) s * a.n_split + split) * a.n_query + j;
}

static inline uint64_t xkv_mtl_span(constant xkv_mtl_args & a, int s, int span, int j) {
    return ((uint64_t) s * a.n_span + span) * a.n_query + j;
}

// units of queries of one KV head, or of any
static inline int xkv_mtl_units_of_head(constant xkv_mtl_args & a) {
    return (a.n_tps * fc_n_gqa + XKV_MTL_VECS - 1) / XKV_MTL_VECS;
}

static inline int xkv_mtl_n_unit(constant xkv_mtl_args & a, thread const xkv_mtl_chunk & c, bool by_head) {
    if (!by_head) {
        return (c.n + XKV_MTL_VECS - 1) / XKV_MTL_VECS;
    }
    const int m = a.n_tps * fc_n_gqa;
    return ((c.j0 + c.n - 1) / m - c.j0 / m + 1) * xkv_mtl_units_of_head(a);
}

static inline xkv_mtl_unit xkv_mtl_find_unit(constant xkv_mtl_args & a, thread const xkv_mtl_chunk & c, int u, bool by_head) {
    xkv_mtl_unit res;
    res.head  = 0;
    res.first = u * XKV_MTL_VECS;
    res.mask  = 0;
    int end   = c.n;
    if (by_head) {
        const int m     = a.n_tps * fc_n_gqa;
        const int units = xkv_mtl_units_of_head(a);
        res.head        = c.j0 / m + u / units;
        res.first       = max(c.j0, res.head * m) - c.j0 + u % units * XKV_MTL_VECS;
        end             = min(c.j0 + c.n, (res.head + 1) * m) - c.j0;
    }
    for (int i = 0; i < XKV_MTL_VECS; ++i) {
        if (res.first + i < end && c.fine[res.first + i] != 0) {
            res.mask |= 1u << i;
        }
    }
    return res;
}

// queries of a unit that have a block in tokens [t0, t1)
static inline uint xkv_mtl_some(thread const xkv_mtl_chunk & c, thread const xkv_mtl_unit & u, int t0, int t1) {
    const uint blocks = (0xffffu >> (16 - (t1 - t0) / XKV_MTL_FINE)) << (t0 / XKV_MTL_FINE);
    uint       res    = 0;
    for (int i = 0; i < XKV_MTL_VECS; ++i) {
        if (((u.mask >> i) & 1) != 0 && (c.fine[u.first + i] & blocks) != 0) {
            res |= 1u << i;
        }
    }
    return res;
}

// number d of a query in a chunk's frame
static inline float xkv_mtl_turned(constant xkv_mtl_args & a, device const float * x, device const float * turn, int d) {
    const int r = d - a.rot_first;
    if (r < 0 || r >= a.n_rot) {
        return x[d];
    }
    const int  pairs = a.n_rot / 2;
    const bool one   = fc_neox != 0 ? r < pairs : r % 2 == 0;
    const int  step  = fc_neox != 0 ? pairs : 1;
    return one ? x[d] * turn[r] - x[d + step] * turn[r + step] : x[d - step] * turn[r] + x[d] * turn[r - step];
}

// queries in the chunk's frame; their scores begin with the mean of K
static inline void xkv_mtl_turn(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic) {
    constant xkv_mtl_args & a    = *in.a;
    device const float *    turn = xkv_mtl_turn_of(in, ic, c.s);
    for (int i = in.warp; i < c.n; i += XKV_MTL_N_WARP) {
        if (c.fine[i] == 0) {
            continue;
        }
        const xkv_mtl_query  at    = xkv_mtl_find_query(a, c.j0 + i);
        device const float * x     = xkv_mtl_query_row(in, at, c.j0 + i, c.s);
        device const float * mean  = in.mean + at.head * fc_dim_k;
        float                first = 0.0f;
        for (int d = in.lane; d < fc_dim_k; d += XKV_MTL_WARP) {
            const float z         = xkv_mtl_turned(a, x, turn, d) * a.scale;
            c.q[i * fc_dim_k + d] = z;
            first += z * mean[d];
        }
        first = simd_sum(first);
        for (int t = in.lane; t < fc_n_chunk; t += XKV_MTL_WARP) {
            c.score[i * fc_n_chunk + t] = first;
        }
    }
}

// end of a slice that begins at direction d0: whole tiles of each segment's coefficients
static inline int xkv_mtl_slice_end(constant xkv_mtl_args & a, int d0, int limit) {
    int end = d0;
    for (int is = 0; is < a.n_segment[XKV_MTL_K]; ++is) {
        constant xkv_mtl_segment & seg  = a.segments[XKV_MTL_K][is];
        const int                  n    = min(seg.first + seg.rank, limit) - end;
        const int                  room = d0 + XKV_MTL_SLICE - end;
        if (n > room) {
            return end + room / xkv_mtl_cols(seg.type) * xkv_mtl_cols(seg.type);
        }
        end += max(n, 0);
    }
    return end;
}

// queries through directions [d0, d1) of the basis of K
static inline void xkv_mtl_project(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int d0, int d1) {
    constant xkv_mtl_args & a      = *in.a;
    const int               n_tile = (d1 - d0) / 16;
    const int               n_item = xkv_mtl_n_unit(a, c, true) * n_tile;
    for (int item = in.warp; item < n_item; item += XKV_MTL_N_WARP) {
        const xkv_mtl_unit u = xkv_mtl_find_unit(a, c, item / n_tile, true);
        if (u.mask == 0) {
            continue;
        }
        const int                  d    = d0 + item % n_tile * 16;
        constant xkv_mtl_segment & seg  = a.segments[XKV_MTL_K][xkv_mtl_segment_of(a, XKV_MTL_K, d)];
        device const uchar *       base = xkv_mtl_basis_of(in, XKV_MTL_K, u.head) + seg.basis;
        base += (d - seg.first) / 16 * xkv_mtl_rows_bytes(seg.type_basis, fc_dim_k);

        float acc[XKV_MTL_VECS] = { 0.0f };
        xkv_mtl_dot(seg.type_basis, base, fc_dim_k, c.q + u.first * fc_dim_k, fc_dim_k, u.mask, in.lane, acc);
        xkv_mtl_both(u.mask, acc);
        XKV_MTL_UNROLL
        for (int i = 0; i < XKV_MTL_VECS; ++i) {
            if (((u.mask >> i) & 1) != 0 && in.lane < 16) {
                c.y[(u.first + i) * XKV_MTL_SLICE + d - d0 + in.lane] = acc[i];
            }
        }
    }
}

// adds directions [d0, d1) to the scores of the blocks that count; x has the queries' numbers of these directions
static inline void xkv_mtl_add_scores(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic, threadgroup const float * x,
                                      int ldx, int d0, int d1) {
    constant xkv_mtl_args & a       = *in.a;
    const bool              by_head = fc_plain != 0;
    const int               n_item  = xkv_mtl_n_unit(a, c, by_head) * xkv_mtl_n_fine();
    for (int item = in.warp; item < n_item; item += XKV_MTL_N_WARP) {
        const int          t = item % xkv_mtl_n_fine() * 16;
        const xkv_mtl_unit u = xkv_mtl_find_unit(a, c, item / xkv_mtl_n_fine(), by_head);
        const uint         m = xkv_mtl_some(c, u, t, t + 16);
        if (m == 0) {
            continue;
        }
        device const uchar * coef              = xkv_mtl_coef_of(in, XKV_MTL_K, ic, u.head, c.s);
        float                acc[XKV_MTL_VECS] = { 0.0f };
        for (int is = 0; is < a.n_segment[XKV_MTL_K]; ++is) {
            constant xkv_mtl_segment & seg = a.segments[XKV_MTL_K][is];
            const int                  r0  = max(d0 - seg.first, 0);
            const int                  r1  = min(d1 - seg.first, seg.rank);
            if (r0 < r1) {
                device const uchar * tiles = coef + seg.coef + t / 16 * xkv_mtl_rows_bytes(seg.type, seg.rank);
                tiles += xkv_mtl_rows_bytes(seg.type, r0);
                xkv_mtl_dot(seg.type, tiles, r1 - r0, x + u.first * ldx + seg.first + r0 - d0, ldx, m, in.lane, acc);
            }
        }
        xkv_mtl_both(m, acc);
        XKV_MTL_UNROLL
        for (int i = 0; i < XKV_MTL_VECS; ++i) {
            if (((m >> i) & 1) != 0 && in.lane < 16) {
                c.score[(u.first + i) * fc_n_chunk + t + in.lane] += acc[i];
            }
        }
    }
}

// adds directions [d0, d1) to the scores, a slice at a time
static inline void xkv_mtl_add_directions(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic, int d0, int d1) {
    if (fc_plain != 0) {
        xkv_mtl_add_scores(in, c, ic, c.q + d0, fc_dim_k, d0, d1);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        return;
    }
    for (int d = d0; d < d1;) {
        const int end = xkv_mtl_slice_end(*in.a, d, d1);
        xkv_mtl_project(in, c, d, end);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add_scores(in, c, ic, c.y, XKV_MTL_SLICE, d, end);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        d = end;
    }
}

// adds V of the blocks that count to the sums of the split: directions below the lead by weights w, others by v, up to limit
static inline void xkv_mtl_add_values(thread const xkv_mtl_in & in, thread const xkv_mtl_chunk & c, int ic, int split,
                                      threadgroup const float * w, threadgroup const float * v, int limit) {
    constant xkv_mtl_args & a       = *in.a;
    const bool              by_head = fc_plain != 0;
    const int               n_tile  = (limit + 15) / 16;
    const int               n_item  = xkv_mtl_n_unit(a, c, by_head) * n_tile;
    device float *          sums    = xkv_mtl_scratch<float>(in, a.at_sums) + xkv_mtl_part(a, c.s, split, c.j0) * a.rank[XKV_MTL_V];
    for (int item = in.warp; item < n_item; item += XKV_MTL_N_WARP) {
        const xkv_mtl_unit u = xkv_mtl_find_unit(a, c, item / n_tile, by_head);
        if (u.mask == 0) {
            continue;
        }
        const int                  d     = item % n_tile * 16;
        constant xkv_mtl_segment & seg   = a.segments[XKV_MTL_V][xkv_mtl_segment_of(a, XKV_MTL_V, d)];
        const int                  cols  = xkv_mtl_cols(seg.type);
        const bool                 lead  = d < a.lead[XKV_MTL_V];
        threadgroup const float *  x     = (lead ? w : v) + u.first * fc_n_chunk;
        device const uchar *       tiles = xkv_mtl_coef_of(in, XKV_MTL_V, ic, u.head, c.s) + seg.coef;
        tiles += (d - seg.first) / 16 * xkv_mtl_rows_bytes(seg.type, fc_n_chunk);

        float acc[XKV_MTL_VECS] = { 0.0f };
        for (int t = 0; t < fc_n_chunk; t += cols) {
            const uint m = xkv_mtl_some(c, u, t, t + cols);
            if (m != 0) {
                xkv_mtl_dot(seg.type, tiles + xkv_mtl_rows_bytes(seg.type, t), cols, x + t, fc_n_chunk, m, in.lane, acc);
            }
        }
        xkv_mtl_both(u.mask, acc);
        XKV_MTL_UNROLL
        for (int i = 0; i < XKV_MTL_VECS; ++i) {
            if (((u.mask >> i) & 1) != 0 && in.lane < 16) {
                const int      j   = u.first + i;
                device float * res = sums + j * a.rank[XKV_MTL_V] + d + in.lane;
                *res               = c.held[j] >= (lead ? 1 : 2) ? *res * c.factor[j] + acc[i] : acc[i];
            }
        }
    }
}
