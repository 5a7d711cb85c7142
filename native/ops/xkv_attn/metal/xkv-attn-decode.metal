// Kernels of few queries; how they follow each other is in xkv-mtl-plan.cpp.

#include "xkv-mtl-decode.h"

// grid: split, tile of queries, stream
kernel void kernel_xkv_attn_lead(XKV_MTL_PARAMS) {
    const xkv_mtl_in    in    = XKV_MTL_IN;
    const xkv_mtl_chunk c     = xkv_mtl_make_chunk(in, false);
    const int           split = in.block[0];
    for (int i = in.thread_index; i < c.n; i += XKV_MTL_THREADS) {
        c.max[i]  = XKV_MTL_NONE;
        c.sum[i]  = 0.0f;
        c.have[i] = 0;
    }
    for (int ic = split; ic < a.n_frame; ic += a.n_split) {
        xkv_mtl_load_fill(in, c, ic);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_turn(in, c, ic);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add_directions(in, c, ic, 0, a.lead[XKV_MTL_K]);
        for (int i = in.warp; i < c.n; i += XKV_MTL_N_WARP) {
            xkv_mtl_weigh_lead(in, c, ic, i);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add_values(in, c, ic, split, c.score, c.score, a.lead[XKV_MTL_V]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = in.thread_index; i < c.n; i += XKV_MTL_THREADS) {
        *xkv_mtl_state(in, c.s, split, c.j0 + i) = float4(c.max[i], c.sum[i], 0.0f, 0.0f);
    }
}

// as the lead, for blocks beyond the least share
kernel void kernel_xkv_attn_refine(XKV_MTL_PARAMS) {
    const xkv_mtl_in    in    = XKV_MTL_IN;
    const xkv_mtl_chunk c     = xkv_mtl_make_chunk(in, true);
    const int           split = in.block[0];
    for (int i = in.thread_index; i < c.n; i += XKV_MTL_THREADS) {
        const float4 state = *xkv_mtl_state(in, c.s, split, c.j0 + i);
        c.max[i]           = state[0];
        c.sum[i]           = state[1];
        c.have[i]          = state[2] > 0.0f ? 2 : 1;
    }
    for (int ic = split; ic < a.n_frame; ic += a.n_split) {
        if (!xkv_mtl_any(xkv_mtl_mark(in, c, ic), in, c.any, XKV_MTL_N_WARP)) {
            continue;
        }
        xkv_mtl_turn(in, c, ic);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add_directions(in, c, ic, 0, a.lead[XKV_MTL_K]);
        xkv_mtl_keep_rough(in, c);
        xkv_mtl_add_directions(in, c, ic, a.lead[XKV_MTL_K], a.rank[XKV_MTL_K]);
        for (int i = in.warp; i < c.n; i += XKV_MTL_N_WARP) {
            xkv_mtl_weigh_fine(in, c, ic, i);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        xkv_mtl_add_values(in, c, ic, split, c.rough, c.score, a.rank[XKV_MTL_V]);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = in.thread_index; i < c.n; i += XKV_MTL_THREADS) {
        *xkv_mtl_state(in, c.s, split, c.j0 + i) = float4(c.max[i], c.sum[i], c.have[i] == 2 ? 1.0f : 0.0f, 0.0f);
    }
}

// which blocks a round refines; grid: query, stream; one SIMD group
kernel void kernel_xkv_attn_least(XKV_MTL_PARAMS) {
    const xkv_mtl_in in    = XKV_MTL_IN;
    const int        j     = in.block[0];
    const int        s     = in.block[1];
    const float2     total = xkv_mtl_total(in, s, j);
    device float2 *  least = xkv_mtl_least(in, s, j);
    if (in.lane == 0) {
        const float now = total[1] > 0.0f ? log(total[1] * a.tolerance) + total[0] : -XKV_MTL_NONE;
        const float old = step.round == 0 ? -XKV_MTL_NONE : (*least)[0];
        *least          = now < old - XKV_MTL_ROUND_LESS ? float2(now, now) : float2(old, -XKV_MTL_NONE);
    }
}

// sums of all parts of a query, through the basis of V; grid: query, stream
kernel void kernel_xkv_attn_merge(XKV_MTL_PARAMS) {
    const xkv_mtl_in in   = XKV_MTL_IN;
    const int        j    = in.block[0];
    const int        s    = in.block[1];
    const int        rank = a.rank[XKV_MTL_V];

    const xkv_mtl_merge_layout l = xkv_mtl_lay_out_merge(rank, fc_dim_v);
    threadgroup float *        z = xkv_mtl_piece<float>(in, l.z, rank);
    threadgroup float *        o = xkv_mtl_piece<float>(in, l.o, fc_dim_v);

    const float2 total = xkv_mtl_total(in, s, j);
    for (int r = in.thread_index; r < rank; r += XKV_MTL_THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < a.n_split; ++i) {
            const float4 state = *xkv_mtl_state(in, s, i, j);
            if (xkv_mtl_seen(state[0]) && (r < a.lead[XKV_MTL_V] || state[2] > 0.0f)) {
                sum += exp(state[0] - total[0]) * xkv_mtl_scratch<float>(in, a.at_sums)[xkv_mtl_part(a, s, i, j) * rank + r];
            }
        }
        z[r] = sum;
    }
    for (int d = in.thread_index; d < fc_dim_v; d += XKV_MTL_THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < a.n_span; ++i) {
            const float2 state = *xkv_mtl_exact_state(in, s, i, j);
            if (xkv_mtl_seen(state[0])) {
                sum += exp(state[0] - total[0]) * xkv_mtl_scratch<float>(in, a.at_exact)[xkv_mtl_span(a, s, i, j) * fc_dim_v + d];
            }
        }
        o[d] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const xkv_mtl_query at    = xkv_mtl_find_query(a, j);
    const float         scale = total[1] > 0.0f ? 1.0f / total[1] : 0.0f;
    device float *      out   = dst + ((uint64_t) s * a.n_query + at.out) * fc_dim_v;
    for (int d = in.warp * 16; d < fc_dim_v; d += XKV_MTL_N_WARP * 16) {
        float acc[XKV_MTL_VECS] = { 0.0f };
        for (int is = 0; is < a.n_segment[XKV_MTL_V] && a.n_split > 0 && fc_plain == 0; ++is) {
            constant xkv_mtl_segment & seg  = a.segments[XKV_MTL_V][is];
            device const uchar *       base = xkv_mtl_basis_of(in, XKV_MTL_V, at.head) + seg.basis;
            base += d / 16 * xkv_mtl_rows_bytes(seg.type_basis, seg.rank);
            xkv_mtl_dot(seg.type_basis, base, seg.rank, z + seg.first, rank, 1, in.lane, acc);
        }
        xkv_mtl_both(1, acc);
        const int i = d + in.lane;
        if (in.lane < 16) {
            out[i] = (o[i] + acc[0] + (fc_plain != 0 && a.n_split > 0 ? z[i] : 0.0f)) * scale;
        }
    }
}
