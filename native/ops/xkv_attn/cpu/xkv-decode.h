// Decoding: buffers and partial sums, and the steps that its files share.

#pragma once

#include "xkv-attn-layer.h"

#include <cmath>

// spans of exact tokens, and parts of the chunks (every XKV_N_PART-th), whose sums stand apart. Threads take the next one when they
// are done with one; which thread that is changes nothing.
static const int64_t XKV_N_EXACT = 4;
static const int64_t XKV_N_PART  = 16;

// Rounds of refinement, and by how much, as a logarithm, a query's softmax has to become smaller for another one. Most have one.
static const int   XKV_N_ROUND    = 3;
static const float XKV_ROUND_LESS = 0.5f;

static const int64_t XKV_PAD = 16;

// queries in frames of chunks that wait until they go through the basis together, beside those of one chunk
static const int64_t XKV_N_PENDING = 32;

// exact tokens that are looked at together
static const int64_t XKV_EXACT_BLOCK = 16;

// sums of a query: n numbers weighted by exp(score - max), then max and sum of weights
struct xkv_partials {
    float * data;
    int64_t n_query, n;

    float * sums(int64_t part, int64_t i) const { return data + (part * n_query + i) * (n + XKV_PAD); }
    float & max(int64_t part, int64_t i) const { return sums(part, i)[n]; }
    float & sum(int64_t part, int64_t i) const { return sums(part, i)[n + 1]; }
    // whether the sums hold more than the lead
    bool deep(int64_t part, int64_t i) const { return sums(part, i)[n + 2] > 0.0f; }
    void set_deep(int64_t part, int64_t i, bool deep) const { sums(part, i)[n + 2] = deep; }
    // log of the sum of weights that a round of refinement begins with: those of later rounds change while some thread still reads it
    float all(int64_t part, int64_t i, int round) const { return sums(part, i)[n + 3 + round]; }
    void  add_up(int64_t part, int64_t i, int round) const {
        sums(part, i)[n + 3 + round] = sum(part, i) > 0.0f ? logf(sum(part, i)) + max(part, i) : -INFINITY;
    }
};

// numbers of each query as they are and rounded, see xkv_rounded
struct xkv_rows {
    float *   x;
    int8_t *  codes;
    float *   scales;
    int32_t * n;
    int64_t   stride; // a multiple of 32

    xkv_rounded at(int64_t row, int64_t col) const {
        const int64_t i = row * stride + col;
        return { x + i, codes + i, scales + i / 32, n + i / 32 };
    }
    float * row(int64_t i) const { return x + i * stride; }

    // numbers [c0, c1) of n rows
    void round(const int64_t * rows, int n_row, int64_t c0, int64_t c1) const {
        const xkv_round_dst dst = { codes, scales, n };

        int64_t       list[4];
        int           n_list  = 0;
        const int64_t n_block = (c1 - c0 + 31) / 32;
        for (int k = 0; k < n_row; ++k) {
            for (int64_t c = 0; c < n_block; ++c) {
                list[n_list++] = (rows[k] * stride + c0) / 32 + c;
                if (n_list == 4) {
                    xkv_round_4(x, dst, list);
                    n_list = 0;
                }
            }
        }
        for (int k = 0; k < n_list; ++k) {
            xkv_round(x, dst, list[k]);
        }
    }

    void negate(int64_t row, int64_t n_col) const {
        const int64_t i = row * stride;
        for (int64_t c = 0; c < n_col; c += 16) {
            xkv_store(x + i + c, xkv_load(x + i + c) * -1.0f);
        }
        for (int64_t c = 0; c < n_col; c += 32) {
            scales[(i + c) / 32] *= -1.0f;
        }
    }

    // 16 rounded numbers become 0
    void clear(int64_t row, int64_t col) const {
        const int64_t i = row * stride + col;
        xkv_store(x + i, f32r());
        for (int64_t c = i; c < i + 16; ++c) {
            n[i / 32] -= codes[c];
        }
        memset(codes + i, 0, 16);
    }
};

// a count that threads share
struct xkv_ticket {
    int64_t value;

    void    reset() { __atomic_store_n(&value, 0, __ATOMIC_RELAXED); }
    int64_t next() { return __atomic_fetch_add(&value, 1, __ATOMIC_RELAXED); }
};

enum { XKV_TICKET_EXACT, XKV_TICKET_LEAD, XKV_TICKET_MERGE, XKV_N_TICKET }; // then the rounds of refinement

struct xkv_decode_buffers {
    xkv_ticket * tickets; // [XKV_N_TICKET + XKV_N_ROUND]

    xkv_partials exact;
    xkv_partials parts;
    float *      peak; // [n_query][n_frame] log of the largest sum of weights of a block of the chunk, by the lead

    // of a thread; a row is a query in a chunk's frame
    xkv_rows  q;      // queries in the chunk's frame
    xkv_rows  y;      // and through the basis of K
    xkv_rows  weight; // of the chunk's tokens
    xkv_rows  taken;  // weights by the lead of refined blocks, negative
    float *   score;  // [n_row][n_chunk]
    float *   rough;  // the same by the lead
    float *   least;  // [n_query] log of the sum of weights by the lead beyond which a block is refined
    float *   above;  // [n_query] and up to which: those beyond it have been
    uint8_t * fine;   // [n_row][n_chunk/XKV_ATTN_FINE]
    float *   row_k;  // [XKV_EXACT_BLOCK][d_k]
    float *   row_v;

    size_t bytes;
};

static inline int64_t xkv_n_part(const xkv_attn_layer & l) {
    return std::min(XKV_N_PART, l.n_frame);
}

static inline void xkv_add_f32(int64_t n, float a, const float * x, float * y) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        xkv_store(y + i, xkv_load(y + i) + xkv_load(x + i) * a);
    }
    for (; i < n; ++i) {
        y[i] += a * x[i];
    }
}

static inline void xkv_scale_f32(int64_t n, float a, float * y) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] *= a;
    }
}

// the queries of a KV head over the exact tokens [j0, j1)
void xkv_exact_span(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t head, int64_t span, int64_t j0, int64_t j1);
