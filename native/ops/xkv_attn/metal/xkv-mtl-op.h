// The op's tensors as the kernels on Metal get them.

#pragma once

#include "../xkv-attn-op.h"
#include "../xkv-tiles.h"
#include "xkv-mtl-plan.h"

#include <algorithm>
#include <cstring>

static_assert(XKV_MTL_N_TYPE == XKV_ATTN_N_TYPE && XKV_MTL_MAX_QUERY == XKV_ATTN_MAX_QUERY && XKV_MTL_MAX_HEAD == XKV_ATTN_MAX_HEAD &&
                  XKV_MTL_FINE == XKV_ATTN_FINE,
              "the kernels are of another op");

static inline void xkv_mtl_set_segments(xkv_mtl_args & a, const xkv_mtl_shape & shape, const xkv_attn_params & par) {
    const bool plain = par.flags & XKV_ATTN_PLAIN;
    size_t     at    = 0;
    for (int kd = 0; kd < 2; ++kd) {
        const int64_t dim     = shape.fc[kd == XKV_MTL_K ? XKV_MTL_FC_DIM_K : XKV_MTL_FC_DIM_V];
        const size_t  at_kind = at;
        size_t        at_base = 0;
        a.rank[kd]            = 0;
        a.n_segment[kd]       = 0;
        for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            const int64_t r = par.rank[kd][i];
            if (r == 0) {
                continue;
            }
            const int       basis = (par.type_basis[i] >> 4 * kd) & 15;
            const ggml_type tc    = xkv_attn_type(i);
            const ggml_type tb    = xkv_attn_type(basis);

            a.segments[kd][a.n_segment[kd]++] = { i, basis, a.rank[kd], (int32_t) r, at, at_base };
            a.rank[kd] += (int32_t) r;
            at += kd == XKV_MTL_K ? xkv_tile_bytes(tc, par.n_chunk, r) : xkv_tile_bytes(tc, r, par.n_chunk);
            if (!plain) {
                at_base += kd == XKV_MTL_K ? xkv_tile_bytes(tb, r, dim) : xkv_tile_bytes(tb, dim, r);
            }
        }
        a.head_coef[kd]  = at - at_kind;
        a.head_basis[kd] = at_base;
        if (plain) {
            at = at_kind + a.n_head_kv * a.head_coef[kd];
        }
        const bool dense = par.tolerance == 0.0f || plain;
        a.lead[kd]       = dense ? a.rank[kd] : std::min<int32_t>(a.rank[kd], par.lead[kd]);
        // whole tiles of K, whose columns are directions
        for (int is = 0; is < a.n_segment[kd] && kd == XKV_MTL_K; ++is) {
            const xkv_mtl_segment & seg  = a.segments[kd][is];
            const int               cols = (int) xkv_tile_cols(xkv_attn_type(seg.type));
            if (a.lead[kd] > seg.first && a.lead[kd] < seg.first + seg.rank) {
                a.lead[kd] = seg.first + (a.lead[kd] - seg.first + cols - 1) / cols * cols;
            }
        }
    }
    a.kind_basis[XKV_MTL_K] = 0;
    a.kind_basis[XKV_MTL_V] = a.n_head_kv * a.head_basis[XKV_MTL_K];
}

static inline xkv_mtl_shape xkv_mtl_op_shape(const ggml_tensor * t) {
    xkv_attn_params par;
    memcpy(&par, t->op_params, sizeof(par));

    xkv_mtl_shape res           = {};
    res.fc[XKV_MTL_FC_DIM_K]    = (int32_t) t->src[0]->ne[0];
    res.fc[XKV_MTL_FC_DIM_V]    = (int32_t) t->ne[0];
    res.fc[XKV_MTL_FC_N_GQA]    = (int32_t) (t->src[0]->ne[1] / t->src[1]->ne[1]);
    res.fc[XKV_MTL_FC_N_CHUNK]  = par.n_chunk;
    res.fc[XKV_MTL_FC_EXACT_K]  = xkv_attn_type_index(t->src[1]->type);
    res.fc[XKV_MTL_FC_EXACT_V]  = xkv_attn_type_index(t->src[2]->type);
    res.fc[XKV_MTL_FC_MASK_F16] = t->src[3]->type == GGML_TYPE_F16;
    res.fc[XKV_MTL_FC_PLAIN]    = (par.flags & XKV_ATTN_PLAIN) != 0;
    res.fc[XKV_MTL_FC_NEOX]     = (par.flags & XKV_ATTN_ROPE_NEOX) != 0;
    return res;
}

// without the places in scratch memory, which are the plan's
static inline xkv_mtl_args xkv_mtl_op_args(const ggml_tensor * t) {
    xkv_attn_params par;
    memcpy(&par, t->op_params, sizeof(par));

    const ggml_tensor * q    = t->src[0];
    const ggml_tensor * mask = t->src[3];
    const ggml_tensor * coef = t->src[4];
    const ggml_tensor * turn = t->src[6];
    const ggml_tensor * fill = t->src[7];

    xkv_mtl_args a = {};
    a.n_head       = (int32_t) q->ne[1];
    a.n_tps        = (int32_t) q->ne[2];
    a.n_stream     = (int32_t) q->ne[3];
    a.n_head_kv    = (int32_t) t->src[1]->ne[1];
    a.n_exact      = (int32_t) t->src[1]->ne[2];
    a.n_query      = a.n_head * a.n_tps;
    a.scale        = par.scale;
    a.tolerance    = par.tolerance;
    a.softcap      = par.softcap;
    a.has_sinks    = t->src[9] != nullptr;
    for (int i = 0; i < 3; ++i) {
        a.nb_q[i] = q->nb[i + 1];
        for (int kd = 0; kd < 2; ++kd) {
            a.nb_exact[kd][i] = t->src[1 + kd]->nb[i + 1];
        }
    }
    a.nb_mask[0] = mask->nb[1];
    a.nb_mask[1] = mask->nb[3];
    if (coef) {
        a.n_frame    = (int32_t) coef->ne[1];
        a.nb_coef[0] = coef->nb[1];
        a.nb_coef[1] = coef->nb[2];
        for (int i = 0; i < 3; ++i) {
            a.nb_fill[i] = fill->nb[i];
        }
    }
    if (turn) {
        a.nb_turn   = turn->nb[2];
        a.n_rot     = (int32_t) turn->ne[0];
        a.rot_first = par.rot_first;
    }
    xkv_mtl_set_segments(a, xkv_mtl_op_shape(t), par);
    return a;
}

// what the kernels cannot do of it; nullptr: nothing
static inline const char * xkv_mtl_op_refusal(const ggml_tensor * t) {
    const auto rows = [](const ggml_tensor * x) {
        return (x->type == GGML_TYPE_F32 || x->type == GGML_TYPE_F16 || x->type == GGML_TYPE_Q8_0) && x->nb[0] == ggml_type_size(x->type);
    };
    const ggml_tensor * q    = t->src[0];
    const ggml_tensor * mask = t->src[3];
    const ggml_tensor * coef = t->src[4];
    if (!xkv_attn_fits(t)) {
        return "heads are not of 16 to 512 numbers, a multiple of 16, or are more than 128";
    }
    if (q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) {
        return "queries are not rows of f32";
    }
    if (!rows(t->src[1]) || !rows(t->src[2])) {
        return "exact K and V are not rows of f32, f16 or q8_0";
    }
    if (mask->type != GGML_TYPE_F32 && mask->type != GGML_TYPE_F16) {
        return "the mask is neither f32 nor f16";
    }
    if (!ggml_is_contiguous(t)) {
        return "the output is not contiguous";
    }
    if (!coef) {
        return nullptr;
    }
    const int n_chunk = xkv_mtl_op_shape(t).fc[XKV_MTL_FC_N_CHUNK];
    if (n_chunk < 32 || n_chunk % 32 != 0 || n_chunk > XKV_MTL_MAX_CHUNK) {
        return "chunks are not of 32 to 256 tokens, a multiple of 32";
    }
    if (coef->nb[1] % 4 != 0 || coef->nb[2] % 4 != 0) {
        return "chunks do not begin at multiples of 4 bytes";
    }
    if (xkv_mtl_op_args(t).rank[XKV_MTL_V] > XKV_MTL_MAX_RANK) {
        return "V has more than 7168 directions";
    }
    return nullptr;
}
