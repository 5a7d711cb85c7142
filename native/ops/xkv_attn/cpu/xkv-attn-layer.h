// The op's arguments as the CPU's kernels read them.

#pragma once

#include "../xkv-attn-op.h"
#include "xkv-tile-kernels.h"

#include <algorithm>

enum { XKV_K = 0, XKV_V = 1 };

struct xkv_attn_segment {
    ggml_type type;
    ggml_type type_basis;
    int64_t   first; // direction
    int64_t   rank;
    size_t    coef;  // bytes from a chunk's begin
    size_t    basis; // bytes from the begin of a KV head's bases of this kind
};

struct xkv_attn_layer {
    xkv_attn_params par;

    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * coef;
    const ggml_tensor * basis;
    const ggml_tensor * turn;
    const ggml_tensor * fill;
    const ggml_tensor * mean;
    const ggml_tensor * sinks;
    ggml_tensor *       dst;

    int64_t dim[2];                                             // numbers of a head
    int64_t n_head, n_head_kv, n_gqa, n_tps, n_stream, n_query; // a query is a token's head, ordered by token, then head
    int64_t n_exact, n_frame, n_chunk, n_rot;

    bool plain, dense;

    int              n_segment[2];
    xkv_attn_segment segments[2][XKV_ATTN_N_TYPE];
    int64_t          rank[2]; // of a head when plain
    int64_t          lead[2];
    size_t           head_coef[2]; // plain: bytes between KV heads in a chunk
    size_t           head_basis[2];
    size_t           kind_basis[2]; // where the bases of a kind begin

    explicit xkv_attn_layer(const ggml_tensor * t) {
        memcpy(&par, t->op_params, sizeof(par));
        dst   = const_cast<ggml_tensor *>(t);
        q     = t->src[0];
        k     = t->src[1];
        v     = t->src[2];
        mask  = t->src[3];
        coef  = t->src[4];
        basis = t->src[5];
        turn  = t->src[6];
        fill  = t->src[7];
        mean  = t->src[8];
        sinks = t->src[9];

        dim[XKV_K] = q->ne[0];
        dim[XKV_V] = t->ne[0];
        n_head     = q->ne[1];
        n_tps      = q->ne[2];
        n_stream   = q->ne[3];
        n_head_kv  = k->ne[1];
        n_gqa      = n_head / n_head_kv;
        n_query    = n_head * n_tps;
        n_exact    = k->ne[2];
        n_chunk    = par.n_chunk;
        n_frame    = coef ? coef->ne[1] : 0;
        n_rot      = turn ? turn->ne[0] : 0;
        plain      = par.flags & XKV_ATTN_PLAIN;
        dense      = par.tolerance == 0.0f;

        size_t at         = 0;
        kind_basis[XKV_K] = 0;
        for (int kd = 0; kd < 2; ++kd) {
            rank[kd]             = 0;
            n_segment[kd]        = 0;
            size_t       at_base = 0;
            const size_t at_kind = at;
            for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
                const int64_t r = par.rank[kd][i];
                if (r == 0) {
                    continue;
                }
                xkv_attn_segment seg = { xkv_attn_type(i), xkv_attn_type((par.type_basis[i] >> 4 * kd) & 15), rank[kd], r, at, at_base };
                segments[kd][n_segment[kd]++] = seg;
                rank[kd] += r;
                at += kd == XKV_K ? xkv_tile_bytes(seg.type, n_chunk, r) : xkv_tile_bytes(seg.type, r, n_chunk);
                at_base += kd == XKV_K ? xkv_tile_bytes(seg.type_basis, r, dim[kd]) : xkv_tile_bytes(seg.type_basis, dim[kd], r);
            }
            head_coef[kd]  = at - at_kind;
            head_basis[kd] = at_base;
            if (plain) {
                at = at_kind + n_head_kv * head_coef[kd];
            }
            lead[kd] = dense || plain ? rank[kd] : std::min<int64_t>(rank[kd], par.lead[kd]);
            // whole tiles of K, whose columns are directions
            for (int is = 0; is < n_segment[kd] && kd == XKV_K; ++is) {
                const auto &  seg  = segments[kd][is];
                const int64_t cols = xkv_tile_cols(seg.type);
                if (lead[kd] > seg.first && lead[kd] < seg.first + seg.rank) {
                    lead[kd] = seg.first + (lead[kd] - seg.first + cols - 1) / cols * cols;
                }
            }
        }
        kind_basis[XKV_V] = kind_basis[XKV_K] + n_head_kv * head_basis[XKV_K];
    }

    const uint8_t * chunk(int64_t ic, int64_t s) const { return (const uint8_t *) coef->data + ic * coef->nb[1] + s * coef->nb[2]; }

    const uint8_t * bases(int kd, int64_t head) const { return (const uint8_t *) basis->data + kind_basis[kd] + head * head_basis[kd]; }

    const float * mean_k(int64_t head) const { return (const float *) mean->data + head * dim[XKV_K]; }

    const float * query(int64_t i, int64_t s) const {
        return (const float *) ((const char *) q->data + i % n_head * q->nb[1] + i / n_head * q->nb[2] + s * q->nb[3]);
    }

    float * out(int64_t i, int64_t s) const {
        return (float *) ((char *) dst->data + i % n_head * dst->nb[1] + i / n_head * dst->nb[2] + s * dst->nb[3]);
    }

    int64_t head_kv(int64_t i) const { return i % n_head / n_gqa; }

    int64_t n_fill(int64_t ic, int64_t t, int64_t s) const {
        return *(const int32_t *) ((const char *) fill->data + ic * fill->nb[0] + t * fill->nb[1] + s * fill->nb[2]);
    }

    float mask_at(int64_t j, int64_t t, int64_t s) const {
        const char * p = (const char *) mask->data + t * mask->nb[1] + s * mask->nb[3];
        return mask->type == GGML_TYPE_F32 ? ((const float *) p)[j] : xkv_f16((const ggml_fp16_t *) p + j);
    }

    // a logit that has a part of the softmax and no value
    float sink(int64_t i) const { return sinks ? ((const float *) sinks->data)[i % n_head] : -INFINITY; }

    // n scores, a multiple of 16
    void cap(float * score, int64_t n) const {
        for (int64_t i = 0; i < n && par.softcap != 0.0f; i += 16) {
            xkv_store(score + i, xkv_tanh(xkv_load(score + i) * (1.0f / par.softcap)) * par.softcap);
        }
    }

    // x turned by the pairs of a chunk's frame
    void rotate(int64_t ic, int64_t s, const float * x, float * y) const {
        memcpy(y, x, dim[XKV_K] * sizeof(float));
        if (n_rot == 0) {
            return;
        }
        const float * c = pairs(ic, s);
        const int64_t n = n_rot / 2;
        x += par.rot_first;
        y += par.rot_first;
        if (par.flags & XKV_ATTN_ROPE_NEOX) {
            for (int64_t i = 0; i < n; ++i) {
                const float xa = x[i], xb = x[i + n];
                y[i]     = xa * c[i] - xb * c[i + n];
                y[i + n] = xa * c[i + n] + xb * c[i];
            }
        } else {
            for (int64_t i = 0; i < n_rot; i += 2) {
                y[i]     = x[i] * c[i] - x[i + 1] * c[i + 1];
                y[i + 1] = x[i] * c[i + 1] + x[i + 1] * c[i];
            }
        }
    }

    // cosine and sine of each pair, from a position's frame to the chunk's
    const float * pairs(int64_t ic, int64_t s) const {
        return (const float *) ((const char *) turn->data + (s * n_frame + ic) * turn->nb[2]);
    }
};

// units [begin, end) of a thread
static inline void xkv_share(int64_t n, int ith, int nth, int64_t * begin, int64_t * end) {
    *begin = n * ith / nth;
    *end   = n * (ith + 1) / nth;
}

// memory of a thread, in pieces of 64 bytes
struct xkv_arena {
    char * at;

    template <typename T> T * take(int64_t n) {
        T * res = (T *) at;
        at += (n * sizeof(T) + 63) / 64 * 64;
        return res;
    }
};

typedef void (*xkv_barrier_t)(void * user);

void   xkv_attn_decode(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user);
size_t xkv_attn_decode_bytes(const xkv_attn_layer & l, int nth);

void   xkv_attn_prefill(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user);
size_t xkv_attn_prefill_bytes(const xkv_attn_layer & l, int nth);
