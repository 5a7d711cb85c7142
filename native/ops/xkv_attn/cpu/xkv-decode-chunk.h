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

    float * score(int64_t i) const { return b.score + i * n_chunk; }

    // query i in the chunk's frame; its scores begin with the mean of K
    void turn_query(int64_t ic, int64_t i) const {
        const int64_t n    = l.dim[XKV_K];
        const float * mean = l.mean_k(l.head_kv(i));

        float * x = b.q.row(i);
        l.rotate(ic, s, l.query(i, s), x);
        f32r sum = {};
        for (int64_t j = 0; j < n; j += 16) {
            const f32r y = xkv_load(x + j) * l.par.scale;
            xkv_store(x + j, y);
            sum += y * xkv_load(mean + j);
        }
        for (int64_t j = n; j < b.q.stride; ++j) {
            x[j] = 0.0f;
        }
        b.q.round(i, 0, b.q.stride);
        const f32r first = xkv_set1(xkv_sum(sum));
        for (int64_t t = 0; t < n_chunk; t += 16) {
            xkv_store(score(i) + t, first);
        }
    }

    // queries list[0 .. n) of one KV head through directions [d0, d1) of the basis
    void project(const int64_t * list, int n, int64_t d0, int64_t d1) const {
        if (l.plain) {
            for (int k = 0; k < n; ++k) {
                memcpy(b.y.row(list[k]), b.q.row(list[k]), l.dim[XKV_K] * sizeof(float));
                b.y.round(list[k], 0, l.dim[XKV_K]);
            }
            return;
        }
        const int64_t   head = l.head_kv(list[0]);
        const uint8_t * base = l.bases(XKV_K, head);
        for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
            const auto &  seg  = l.segments[XKV_K][is];
            const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
            const int64_t r1   = std::min(d1 - seg.first, seg.rank);
            const size_t  tile = xkv_tile_bytes(seg.type_basis, 16, l.dim[XKV_K]);
            for (int64_t r = r0; r < r1; r += 16) {
                for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                    const int   m = std::min(XKV_DOT_MAX, n - k0);
                    xkv_rounded y[XKV_DOT_MAX];
                    f32r        res[XKV_DOT_MAX] = {};
                    for (int k = 0; k < m; ++k) {
                        y[k] = b.q.at(list[k0 + k], 0);
                    }
                    xkv_dot_tiles(m, seg.type_basis, base + seg.basis + r / 16 * tile, l.dim[XKV_K], y, res);
                    for (int k = 0; k < m; ++k) {
                        xkv_store(b.y.row(list[k0 + k]) + seg.first + r, res[k]);
                    }
                }
            }
        }
        for (int k = 0; k < n; ++k) {
            b.y.round(list[k], d0, d1);
        }
    }

    // adds directions [d0, d1) to the scores of 16 tokens from t0 on
    void add_scores(int64_t ic, const int64_t * list, int n, int64_t head, int64_t t0, int64_t d0, int64_t d1) const {
        for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
            const int m = std::min(XKV_DOT_MAX, n - k0);
            f32r      res[XKV_DOT_MAX];
            for (int k = 0; k < m; ++k) {
                res[k] = xkv_load(score(list[k0 + k]) + t0);
            }
            for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
                const auto &  seg = l.segments[XKV_K][is];
                const int64_t r0  = std::max(d0 - seg.first, (int64_t) 0);
                const int64_t r1  = std::min(d1 - seg.first, seg.rank);
                if (r0 >= r1) {
                    continue;
                }
                xkv_rounded y[XKV_DOT_MAX];
                for (int k = 0; k < m; ++k) {
                    y[k] = b.y.at(list[k0 + k], seg.first + r0);
                }
                const uint8_t * tiles =
                    coef(ic, XKV_K, seg, head) + t0 / 16 * xkv_tile_bytes(seg.type, 16, seg.rank) + xkv_tile_bytes(seg.type, 16, r0);
                xkv_dot_tiles(m, seg.type, tiles, r1 - r0, y, res);
            }
            for (int k = 0; k < m; ++k) {
                xkv_store(score(list[k0 + k]) + t0, res[k]);
            }
        }
    }

    // adds directions [d0, d1) of V of tokens [t0, t1), whole tiles of the segment, weighted
    void add_values(int64_t ic, const xkv_attn_segment & seg, const xkv_rows & weight, const int64_t * list, int n, int64_t head,
                    int64_t t0, int64_t t1, int64_t d0, int64_t d1) const {
        const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
        const int64_t r1   = std::min(d1 - seg.first, seg.rank);
        const size_t  tile = xkv_tile_bytes(seg.type, 16, n_chunk);
        const size_t  skip = xkv_tile_bytes(seg.type, 16, t0);
        for (int64_t r = r0; r < r1; r += 16) {
            const uint8_t * tiles = coef(ic, XKV_V, seg, head) + r / 16 * tile + skip;
            for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                const int   m = std::min(XKV_DOT_MAX, n - k0);
                xkv_rounded y[XKV_DOT_MAX];
                f32r        res[XKV_DOT_MAX];
                for (int k = 0; k < m; ++k) {
                    y[k]   = weight.at(list[k0 + k], t0);
                    res[k] = xkv_load(b.parts.sums(part, list[k0 + k]) + seg.first + r);
                }
                xkv_dot_tiles(m, seg.type, tiles, t1 - t0, y, res);
                for (int k = 0; k < m; ++k) {
                    xkv_store(b.parts.sums(part, list[k0 + k]) + seg.first + r, res[k]);
                }
            }
        }
    }

    // tokens that the query doesn't see
    void mask_tail(int64_t ic, int64_t i, float * scores) const {
        for (int64_t t = l.n_fill(ic, i / l.n_head, s); t < n_chunk; ++t) {
            scores[t] = -INFINITY;
        }
    }

    float max_score(int64_t i) const {
        f32r m = xkv_load(score(i));
        for (int64_t t = 16; t < n_chunk; t += 16) {
            m = xkv_max(m, xkv_load(score(i) + t));
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

// the rest of the directions, for blocks of the part's chunks that b.least and b.above let in
void xkv_decode_refine(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part, int round);
