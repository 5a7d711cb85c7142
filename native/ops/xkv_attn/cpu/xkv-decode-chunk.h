// Decoding: what the pass by the lead and the refinement do with a chunk, by one thread.

#pragma once

#include "xkv-decode.h"

#include <cmath>

struct xkv_decode_chunk {
    const xkv_attn_layer &     l;
    const xkv_decode_buffers & b;

    const int64_t s;
    const int64_t part;
    const int64_t n_query;
    const int64_t n_chunk;
    const int64_t n_fine;

    xkv_decode_chunk(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part) :
        l(l), b(b), s(s), part(part), n_query(l.n_query), n_chunk(l.n_chunk), n_fine(l.n_chunk / XKV_ATTN_FINE) {}

    // where a kind's coefficients of a segment begin for a KV head
    const uint8_t * coef(int64_t ic, int kd, const xkv_attn_segment & seg, int64_t head) const {
        return l.chunk(ic, s) + seg.coef + (l.plain ? head * l.head_coef[kd] : 0);
    }

    float * score(int64_t row) const { return b.score + row * n_chunk; }

    // queries in the chunk's frame and their scores, which begin with the mean of K, are rows of the thread's buffers
    void turn(int64_t ic, const int64_t * queries, const int64_t * rows, int n) const {
        const int64_t n_k = l.dim[XKV_K];
        for (int k0 = 0; k0 < n; k0 += 4) {
            f32r  sum[4] = {};
            float first[4];
            for (int k = k0; k < std::min(k0 + 4, n); ++k) {
                const float * mean = l.mean_k(l.head_kv(queries[k]));
                float *       x    = b.q.row(rows[k]);
                l.rotate(ic, s, l.query(queries[k], s), x);
                for (int64_t j = 0; j < n_k; j += 16) {
                    const f32r y = xkv_load(x + j) * l.par.scale;
                    xkv_store(x + j, y);
                    sum[k - k0] += y * xkv_load(mean + j);
                }
                for (int64_t j = n_k; j < b.q.stride; ++j) {
                    x[j] = 0.0f;
                }
            }
            xkv_sum_4(sum, first);
            for (int k = k0; k < std::min(k0 + 4, n); ++k) {
                for (int64_t t = 0; t < n_chunk; t += 16) {
                    xkv_store(score(rows[k]) + t, xkv_set1(first[k - k0]));
                }
            }
        }
        b.q.round(rows, n, 0, b.q.stride);
    }

    // rows list[0 .. n), queries of one KV head, through directions [d0, d1) of the basis
    void project(int64_t head, const int64_t * list, int n, int64_t d0, int64_t d1) const {
        if (l.plain) {
            for (int k = 0; k < n; ++k) {
                memcpy(b.y.row(list[k]), b.q.row(list[k]), l.dim[XKV_K] * sizeof(float));
            }
            b.y.round(list, n, 0, l.dim[XKV_K]);
            return;
        }
        const uint8_t * base = l.bases(XKV_K, head);
        for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
            const auto &  seg  = l.segments[XKV_K][is];
            const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
            const int64_t r1   = std::min(d1 - seg.first, seg.rank);
            const size_t  tile = xkv_tile_bytes(seg.type_basis, 16, l.dim[XKV_K]);
            if (r0 >= r1) {
                continue;
            }
            const xkv_blocks blocks = { base + seg.basis + r0 / 16 * tile, tile, (r1 - r0) / 16 };
            for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                const int   m = std::min(XKV_DOT_MAX, n - k0);
                xkv_rounded y[XKV_DOT_MAX];
                float *     dst[XKV_DOT_MAX];
                for (int k = 0; k < m; ++k) {
                    y[k]   = b.q.at(list[k0 + k], 0);
                    dst[k] = b.y.row(list[k0 + k]) + seg.first + r0;
                    memset(dst[k], 0, (r1 - r0) * sizeof(float));
                }
                xkv_dot_blocks(m, seg.type_basis, blocks, l.dim[XKV_K], y, dst);
            }
        }
        b.y.round(list, n, d0, d1);
    }

    // adds directions [d0, d1) to the scores of tokens [t0, t1)
    void add_scores(int64_t ic, const int64_t * list, int n, int64_t head, int64_t t0, int64_t t1, int64_t d0, int64_t d1) const {
        for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
            const auto &  seg = l.segments[XKV_K][is];
            const int64_t r0  = std::max(d0 - seg.first, (int64_t) 0);
            const int64_t r1  = std::min(d1 - seg.first, seg.rank);
            if (r0 >= r1) {
                continue;
            }
            const size_t     tile   = xkv_tile_bytes(seg.type, 16, seg.rank);
            const xkv_blocks blocks = { coef(ic, XKV_K, seg, head) + t0 / 16 * tile + xkv_tile_bytes(seg.type, 16, r0), tile,
                                        (t1 - t0) / 16 };
            for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                const int   m = std::min(XKV_DOT_MAX, n - k0);
                xkv_rounded y[XKV_DOT_MAX];
                float *     dst[XKV_DOT_MAX];
                for (int k = 0; k < m; ++k) {
                    y[k]   = b.y.at(list[k0 + k], seg.first + r0);
                    dst[k] = score(list[k0 + k]) + t0;
                }
                xkv_dot_blocks(m, seg.type, blocks, r1 - r0, y, dst);
            }
        }
    }

    // adds directions [d0, d1) of V of tokens [t0, t1), whole tiles of the segment, weighted by rows, to the sums of queries
    void add_values(int64_t ic, const xkv_attn_segment & seg, const xkv_rows & weight, const int64_t * rows, const int64_t * queries, int n,
                    int64_t head, int64_t t0, int64_t t1, int64_t d0, int64_t d1) const {
        const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
        const int64_t r1   = std::min(d1 - seg.first, seg.rank);
        const size_t  tile = xkv_tile_bytes(seg.type, 16, n_chunk);
        if (r0 >= r1) {
            return;
        }
        const uint8_t *  tiles  = coef(ic, XKV_V, seg, head) + r0 / 16 * tile + xkv_tile_bytes(seg.type, 16, t0);
        const xkv_blocks blocks = { tiles, tile, (r1 - r0) / 16 };
        for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
            const int   m = std::min(XKV_DOT_MAX, n - k0);
            xkv_rounded y[XKV_DOT_MAX];
            float *     dst[XKV_DOT_MAX];
            for (int k = 0; k < m; ++k) {
                y[k]   = weight.at(rows[k0 + k], t0);
                dst[k] = b.parts.sums(part, queries[k0 + k]) + seg.first + r0;
            }
            xkv_dot_blocks(m, seg.type, blocks, t1 - t0, y, dst);
        }
    }

    // tokens that the query doesn't see
    void mask_tail(int64_t ic, int64_t i, float * scores) const {
        for (int64_t t = l.n_fill(ic, i / l.n_head, s); t < n_chunk; ++t) {
            scores[t] = -INFINITY;
        }
    }

    float max_score(int64_t row) const {
        f32r m = xkv_load(score(row));
        for (int64_t t = 16; t < n_chunk; t += 16) {
            m = xkv_max(m, xkv_load(score(row) + t));
        }
        return xkv_max(m);
    }

    // the sums so far for a larger max
    void raise_max(int64_t i, float m) const {
        float & max = b.parts.max(part, i);
        if (m <= max) {
            return;
        }
        const float f = max == -INFINITY ? 0.0f : expf(max - m);
        xkv_scale_f32(b.parts.deep(part, i) ? l.rank[XKV_V] : l.lead[XKV_V], f, b.parts.sums(part, i));
        b.parts.sum(part, i) *= f;
        max = m;
    }
};

// Queries of several chunks, a row each, by chunk and then by KV head.
struct xkv_decode_rows : xkv_decode_chunk {
    using xkv_decode_chunk::xkv_decode_chunk;

    static const int64_t n_max = XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS + XKV_N_PENDING;

    int     n = 0;
    int64_t chunks[n_max];
    int64_t queries[n_max];

    void push(int64_t ic, int64_t i) {
        chunks[n]    = ic;
        queries[n++] = i;
    }

    template <typename F> void each_chunk(F && f) const {
        for (int r0 = 0, r1 = 0; r0 < n; r0 = r1) {
            while (r1 < n && chunks[r1] == chunks[r0]) {
                ++r1;
            }
            f(chunks[r0], r0, r1);
        }
    }

    // into the frames of their chunks, and through directions [0, rank) of K: a basis is read once for all rows of its KV head
    void project_all(int64_t rank) const {
        int64_t list[n_max];
        for (int row = 0; row < n; ++row) {
            list[row] = row;
        }
        each_chunk([&](int64_t ic, int r0, int r1) { turn(ic, queries + r0, list + r0, r1 - r0); });
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            int n_list = 0;
            for (int row = 0; row < n; ++row) {
                if (l.head_kv(queries[row]) == h) {
                    list[n_list++] = row;
                }
            }
            project(h, list, n_list, 0, rank);
        }
    }
};

// all tokens of the part's chunks by the lead
void xkv_decode_lead(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part);

// the rest of the directions, for blocks of the part's chunks that b.least and b.above let in
void xkv_decode_refine(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part, int round);
