// Prefill: buffers, products of f32 panels, and how K and V of tokens are made.

#pragma once

#include "xkv-attn-layer.h"

// tokens of a tile, and tiles of a batch
static const int64_t XKV_TILE_TOKENS = 64;
static const int64_t XKV_BATCH_TILES = 8;

// queries of a KV head that one thread takes at a time: a multiple of the rows that meet a tile together
static const int64_t XKV_UNIT_ROWS = 16 * XKV_MUL_ROWS;

static inline int64_t xkv_pad16(int64_t n) {
    return (n + 15) / 16 * 16;
}

// tokens of one chunk, or exact ones
struct xkv_tile_of {
    int64_t ic;    // chunk; -1: exact tokens
    int64_t first; // token of the chunk or of the exact ones
    int64_t n;     // tokens
    int64_t n_pad; // a multiple of 16
};

struct xkv_prefill_buffers {
    float * state; // [n_query][2] max and sum of weights
    float * kt;    // [n_head_kv][tiles][d_k][tokens]
    float * vt;    // [n_head_kv][tiles][tokens][d_v]

    // of a thread
    float * base_k; // [d_k][rank]
    float * base_v; // [rank][d_v]
    float * coef_k; // [rank][tokens]
    float * coef_v; // [tokens][rank]
    float * s;      // [rows][tokens]
    float * q;      // [rows of a unit][d_k] times the scale

    xkv_tile_of * tiles; // of the stream

    size_t bytes;
};

template <int M, int NV, bool ADD>
static inline void xkv_mul_block(int64_t n, const float * const * a, const float * b, int64_t ldb, float * const * c) {
    f32r acc[M][NV];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < NV; ++v) {
            acc[m][v] = ADD ? xkv_load(c[m] + 16 * v) : f32r{};
        }
    }
    xkv_mul_panel<M, NV>(n, a, b, ldb, acc);
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < NV; ++v) {
            xkv_store(c[m] + 16 * v, acc[m][v]);
        }
    }
}

template <int NV, bool ADD>
static inline void xkv_mul_rows(int m, int64_t n, const float * const * a, const float * b, int64_t ldb, float * const * c) {
    switch (m) {
    case 1:
        xkv_mul_block<1, NV, ADD>(n, a, b, ldb, c);
        break;
    case 2:
        xkv_mul_block<2, NV, ADD>(n, a, b, ldb, c);
        break;
    case 3:
        xkv_mul_block<3, NV, ADD>(n, a, b, ldb, c);
        break;
    case 4:
        xkv_mul_block<4, NV, ADD>(n, a, b, ldb, c);
        break;
    case 5:
        xkv_mul_block<5, NV, ADD>(n, a, b, ldb, c);
        break;
    case 6:
        xkv_mul_block<6, NV, ADD>(n, a, b, ldb, c);
        break;
    }
}

// c[m][0 .. n_col) (+)= sum over k < n of a[m][k] times row k of b; up to XKV_MUL_ROWS rows, n_col a multiple of 16
template <bool ADD>
static inline void xkv_mul(int m, int64_t n, int64_t n_col, const float * const * a, const float * b, int64_t ldb, float * const * c0) {
    float * c[XKV_MUL_ROWS];
    for (int64_t j = 0; j < n_col;) {
        for (int i = 0; i < m; ++i) {
            c[i] = c0[i] + j;
        }
        const int64_t rest = (n_col - j) / 16;
        if (XKV_MUL_VECS >= 4 && rest >= 4) {
            xkv_mul_rows<XKV_MUL_VECS, ADD>(m, n, a, b + j, ldb, c);
            j += 16 * XKV_MUL_VECS;
        } else if (XKV_MUL_VECS >= 4 && rest >= 2) {
            xkv_mul_rows<2, ADD>(m, n, a, b + j, ldb, c);
            j += 32;
        } else {
            xkv_mul_rows<1, ADD>(m, n, a, b + j, ldb, c);
            j += 16;
        }
    }
}

// a KV head of a stream
struct xkv_prefill_head {
    const xkv_attn_layer &      l;
    const xkv_prefill_buffers & b;

    const int64_t s;
    const int64_t head; // KV head

    const int64_t dk = xkv_pad16(l.dim[XKV_K]);
    const int64_t dv = xkv_pad16(l.dim[XKV_V]);
    const int64_t rk = xkv_pad16(l.rank[XKV_K]);
    const int64_t rv = xkv_pad16(l.rank[XKV_V]);

    float * kt(int64_t tile) const { return b.kt + (head * XKV_BATCH_TILES + tile) * XKV_TILE_TOKENS * dk; }
    float * vt(int64_t tile) const { return b.vt + (head * XKV_BATCH_TILES + tile) * XKV_TILE_TOKENS * dv; }
};

// the head's bases as f32, in the thread's buffers
void xkv_prefill_expand_bases(const xkv_prefill_head & h);

// K [d_k][n_pad] and V [n_pad][d_v] of a tile, the i-th of its batch
void xkv_prefill_make(const xkv_prefill_head & h, const xkv_tile_of & tile, int64_t i);
