// The op's tensors as the kernels on CUDA get them.

#pragma once

#include "../xkv-attn-op.h"
#include "../xkv-tiles.h"
#include "xkv-attn.cuh"

#include <algorithm>
#include <cstring>

static_assert((int) XKV_CU_N_TYPE == XKV_ATTN_N_TYPE && XKV_CU_MAX_QUERY == XKV_ATTN_MAX_QUERY && XKV_CU_MAX_HEAD == XKV_ATTN_MAX_HEAD,
              "the kernels are of another op");

static inline void xkv_cu_set_segments(xkv_cu_attn & a, const xkv_attn_params & par) {
    size_t at = 0;
    for (int kd = 0; kd < 2; ++kd) {
        const int64_t dim     = a.dim[kd];
        const size_t  at_kind = at;
        size_t        at_base = 0;
        a.rank[kd]            = 0;
        a.n_segment[kd]       = 0;
        a.lead[kd]            = 0;
        for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            const int64_t r = par.rank[kd][i];
            if (r == 0) {
                continue;
            }
            const int       basis = (par.type_basis[i] >> 4 * kd) & 15;
            const ggml_type tc    = xkv_attn_type(i);
            const ggml_type tb    = xkv_attn_type(basis);

            a.segments[kd][a.n_segment[kd]++]                        = { i, basis, a.rank[kd], (int) r, at, at_base };
            (i > XKV_CU_F16 ? a.coef_ints : a.coef_floats)[kd]       = true;
            (basis > XKV_CU_F16 ? a.basis_ints : a.basis_floats)[kd] = true;
            a.rank[kd] += (int) r;
            at += kd == XKV_CU_K ? xkv_tile_bytes(tc, a.n_chunk, r) : xkv_tile_bytes(tc, r, a.n_chunk);
            if (!a.plain) {
                at_base += kd == XKV_CU_K ? xkv_tile_bytes(tb, r, dim) : xkv_tile_bytes(tb, dim, r);
            }
        }
        a.head_coef[kd]  = at - at_kind;
        a.head_basis[kd] = at_base;
        if (a.plain) {
            at = at_kind + a.n_head_kv * a.head_coef[kd];
        }
        const bool dense = par.tolerance == 0.0f || a.plain;
        a.lead[kd]       = dense ? a.rank[kd] : std::min<int>(a.rank[kd], par.lead[kd]);
        // whole tiles of K, whose columns are directions
        for (int is = 0; is < a.n_segment[kd] && kd == XKV_CU_K; ++is) {
            const xkv_cu_segment & seg  = a.segments[kd][is];
            const int              cols = (int) xkv_tile_cols(xkv_attn_type(seg.type));
            if (a.lead[kd] > seg.first && a.lead[kd] < seg.first + seg.rank) {
                a.lead[kd] = seg.first + (a.lead[kd] - seg.first + cols - 1) / cols * cols;
            }
        }
    }
    a.kind_basis[XKV_CU_K] = 0;
    a.kind_basis[XKV_CU_V] = a.n_head_kv * a.head_basis[XKV_CU_K];
}

static inline xkv_cu_attn xkv_cu_attn_args(const ggml_tensor * t) {
    xkv_attn_params par;
    memcpy(&par, t->op_params, sizeof(par));

    const ggml_tensor * q     = t->src[0];
    const ggml_tensor * mask  = t->src[3];
    const ggml_tensor * coef  = t->src[4];
    const ggml_tensor * basis = t->src[5];
    const ggml_tensor * turn  = t->src[6];
    const ggml_tensor * fill  = t->src[7];
    const ggml_tensor * mean  = t->src[8];
    const ggml_tensor * sinks = t->src[9];

    xkv_cu_attn a   = {};
    a.dst           = (float *) t->data;
    a.q             = (const char *) q->data;
    a.dim[XKV_CU_K] = (int) q->ne[0];
    a.dim[XKV_CU_V] = (int) t->ne[0];
    a.n_head        = (int) q->ne[1];
    a.n_tps         = (int) q->ne[2];
    a.n_stream      = (int) q->ne[3];
    a.n_head_kv     = (int) t->src[1]->ne[1];
    a.n_gqa         = a.n_head / a.n_head_kv;
    a.n_exact       = (int) t->src[1]->ne[2];
    a.scale         = par.scale;
    a.tolerance     = par.tolerance;
    a.softcap       = par.softcap;
    a.sinks         = sinks ? (const float *) sinks->data : nullptr;
    a.n_chunk       = par.n_chunk;
    a.neox          = par.flags & XKV_ATTN_ROPE_NEOX;
    a.plain         = par.flags & XKV_ATTN_PLAIN;
    for (int i = 0; i < 3; ++i) {
        a.nb_q[i] = q->nb[i + 1];
    }
    for (int kd = 0; kd < 2; ++kd) {
        const ggml_tensor * x = t->src[1 + kd];

        a.exact[kd] = { (const char *) x->data, xkv_attn_type_index(x->type), { x->nb[1], x->nb[2], x->nb[3] } };
    }
    a.mask       = (const char *) mask->data;
    a.mask_f16   = mask->type == GGML_TYPE_F16;
    a.nb_mask[0] = mask->nb[1];
    a.nb_mask[1] = mask->nb[3];
    if (coef) {
        a.n_frame    = (int) coef->ne[1];
        a.coef       = (const uint8_t *) coef->data;
        a.nb_coef[0] = coef->nb[1];
        a.nb_coef[1] = coef->nb[2];
        a.fill       = (const char *) fill->data;
        a.mean       = (const float *) mean->data;
        for (int i = 0; i < 3; ++i) {
            a.nb_fill[i] = fill->nb[i];
        }
    }
    if (basis) {
        a.basis = (const uint8_t *) basis->data;
    }
    if (turn) {
        a.turn      = (const char *) turn->data;
        a.nb_turn   = turn->nb[2];
        a.n_rot     = (int) turn->ne[0];
        a.rot_first = par.rot_first;
    }
    xkv_cu_set_segments(a, par);
    return a;
}

// whether the kernels can do it
static inline bool xkv_cu_attn_can(const ggml_tensor * t) {
    const auto rows = [](const ggml_tensor * x) {
        // numbers are read two at a time
        const size_t step = x->type == GGML_TYPE_Q8_0 ? 2 : 4;
        return (x->type == GGML_TYPE_F32 || x->type == GGML_TYPE_F16 || x->type == GGML_TYPE_Q8_0) && x->nb[0] == ggml_type_size(x->type) &&
               x->nb[1] % step == 0 && x->nb[2] % step == 0 && x->nb[3] % step == 0;
    };
    const ggml_tensor * q    = t->src[0];
    const ggml_tensor * m    = t->src[3];
    const ggml_tensor * coef = t->src[4];
    if (!xkv_attn_fits(t) || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float) || !rows(t->src[1]) || !rows(t->src[2]) ||
        !ggml_is_contiguous(t) || (m->type != GGML_TYPE_F32 && m->type != GGML_TYPE_F16)) {
        return false;
    }
    const xkv_cu_attn a = xkv_cu_attn_args(t);
    // queries and directions of V are rounded in blocks that stay in a segment
    for (int kd = 0; kd < 2; ++kd) {
        for (int is = 0; is < a.n_segment[kd]; ++is) {
            const xkv_cu_segment & seg = a.segments[kd][is];
            if (seg.first % 32 != 0 && (seg.type > XKV_CU_F16 || seg.type_basis > XKV_CU_F16)) {
                return false;
            }
        }
    }
    return !coef || (coef->nb[1] % 4 == 0 && coef->nb[2] % 4 == 0 && a.n_chunk % 32 == 0 && a.n_chunk <= XKV_CU_MAX_CHUNK &&
                     a.rank[XKV_CU_V] <= XKV_CU_MAX_RANK);
}
