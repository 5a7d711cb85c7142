// Queries on Metal: ordered by KV head, then token, then head of the group.

#pragma once

#include "xkv-mtl-tiles.h"

struct xkv_mtl_query {
    int head; // KV head
    int token;
    int out; // head by head of each token, as q and dst are
};

static inline xkv_mtl_query xkv_mtl_find_query(constant xkv_mtl_args & a, int j) {
    const int m = a.n_tps * fc_n_gqa;

    xkv_mtl_query res;
    res.head  = j / m;
    res.token = (j - res.head * m) / fc_n_gqa;
    res.out   = res.token * a.n_head + res.head * fc_n_gqa + j % fc_n_gqa;
    return res;
}

// the query's head among all
static inline int xkv_mtl_head_of(thread const xkv_mtl_query & at, int j) {
    return at.head * fc_n_gqa + j % fc_n_gqa;
}

static inline device const float * xkv_mtl_query_row(thread const xkv_mtl_in & in, thread const xkv_mtl_query & at, int j, int s) {
    constant xkv_mtl_args & a = *in.a;
    return (device const float *) (in.q + xkv_mtl_head_of(at, j) * a.nb_q[0] + at.token * a.nb_q[1] + s * a.nb_q[2]);
}

// stored tokens of a chunk that a query sees
static inline int xkv_mtl_n_fill(thread const xkv_mtl_in & in, int ic, int t, int s) {
    constant xkv_mtl_args & a = *in.a;
    return *(device const int *) (in.fill + ic * a.nb_fill[0] + t * a.nb_fill[1] + s * a.nb_fill[2]);
}

// the pairs of a chunk's frame
static inline device const float * xkv_mtl_turn_of(thread const xkv_mtl_in & in, int ic, int s) {
    constant xkv_mtl_args & a = *in.a;
    return (device const float *) (in.turn + ((uint64_t) s * a.n_frame + ic) * a.nb_turn);
}

// coefficients of a kind of a chunk, of a KV head when plain
static inline device const uchar * xkv_mtl_coef_of(thread const xkv_mtl_in & in, int kd, int ic, int head, int s) {
    constant xkv_mtl_args & a = *in.a;
    return in.coef + ic * a.nb_coef[0] + s * a.nb_coef[1] + (fc_plain != 0 ? head * a.head_coef[kd] : 0);
}

static inline device const uchar * xkv_mtl_basis_of(thread const xkv_mtl_in & in, int kd, int head) {
    constant xkv_mtl_args & a = *in.a;
    return in.basis + a.kind_basis[kd] + head * a.head_basis[kd];
}

// the segment of a direction
static inline int xkv_mtl_segment_of(constant xkv_mtl_args & a, int kd, int d) {
    int is = 0;
    while (d >= a.segments[kd][is].first + a.segments[kd][is].rank) {
        ++is;
    }
    return is;
}

static inline float xkv_mtl_exact_at(int type, device const char * row, int d) {
    if (type == XKV_MTL_F32) {
        return ((device const float *) row)[d];
    }
    if (type == XKV_MTL_F16) {
        return (float) ((device const half *) row)[d];
    }
    device const char * block = row + d / 32 * 34; // Q8_0
    return (float) *(device const half *) block * (float) block[2 + d % 32];
}

static inline device const char * xkv_mtl_exact_row(thread const xkv_mtl_in & in, int kd, int token, int head, int s) {
    constant xkv_mtl_args & a = *in.a;
    return in.exact[kd] + head * a.nb_exact[kd][0] + token * a.nb_exact[kd][1] + s * a.nb_exact[kd][2];
}

static inline float xkv_mtl_mask_at(thread const xkv_mtl_in & in, int token, int t, int s) {
    device const char * p = in.mask + t * in.a->nb_mask[0] + s * in.a->nb_mask[1];
    const float         x = fc_mask_f16 != 0 ? (float) ((device const half *) p)[token] : ((device const float *) p)[token];
    return max(x, XKV_MTL_NONE);
}
