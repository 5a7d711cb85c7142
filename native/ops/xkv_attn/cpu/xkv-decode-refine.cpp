// Decoding: what the lead has counted roughly is counted again with all directions, in blocks of tokens that hold more than the
// tolerance of a query's softmax.

#include "xkv-decode-chunk.h"

struct xkv_decode_refine_chunk : xkv_decode_chunk {
    using xkv_decode_chunk::xkv_decode_chunk;

    const uint8_t * fine(int64_t i) const { return b.fine + i * n_fine; }

    float * rough(int64_t i) const { return b.rough + i * n_chunk; }

    // marks the blocks of a query that are refined
    bool mark(int64_t i) const {
        const float max = b.parts.max(part, i);
        bool        any = false;
        for (int64_t f = 0; f < n_fine; ++f) {
            const float sum        = xkv_sum(xkv_exp(xkv_load(rough(i) + 16 * f) - max));
            const float all        = logf(sum) + max;
            b.fine[i * n_fine + f] = all > b.least[i] && all <= b.above[i];
            any                    = any || b.fine[i * n_fine + f];
        }
        return any;
    }

    // weights of refined blocks, and those by the lead, rounded as they were when they were added
    void weigh(int64_t i) const {
        const float max = b.parts.max(part, i);
        float *     w   = b.weight.row(i);
        float *     r   = b.taken.row(i);
        f32r        sum = {};
        for (int64_t f = 0; f < n_fine; ++f) {
            const f32r led = xkv_exp(xkv_load(rough(i) + 16 * f) - max);
            f32r       p   = {};
            if (fine(i)[f]) {
                p = xkv_exp(xkv_load(score(i) + 16 * f) - max);
                sum += p - led;
            }
            xkv_store(w + 16 * f, p);
            xkv_store(r + 16 * f, led);
        }
        b.parts.sum(part, i) += xkv_sum(sum);
        b.weight.round(i, 0, n_chunk);
        b.taken.round(i, 0, n_chunk);
        b.taken.negate(i, n_chunk);
        for (int64_t f = 0; f < n_fine; ++f) {
            if (!fine(i)[f]) {
                b.taken.clear(i, 16 * f);
            }
        }
    }

    // those of list whose blocks in tokens [t0, t1) are refined
    int some(const int64_t * list, int n, int64_t t0, int64_t t1, int64_t * res) const {
        int n_res = 0;
        for (int k = 0; k < n; ++k) {
            bool any = false;
            for (int64_t f = t0 / XKV_ATTN_FINE; f < std::min(t1 / XKV_ATTN_FINE, n_fine); ++f) {
                any = any || fine(list[k])[f];
            }
            if (any) {
                res[n_res++] = list[k];
            }
        }
        return n_res;
    }

    void run(int64_t ic) const {
        int64_t list[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS]; // queries with blocks to refine, by KV head
        int64_t some_of[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];
        int     n = 0;
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            const int first = n;
            for (int64_t t = 0; t < l.n_tps; ++t) {
                for (int64_t g = 0; g < l.n_gqa; ++g) {
                    const int64_t i = t * l.n_head + h * l.n_gqa + g;
                    if (b.peak[i * l.n_frame + ic] > b.least[i] && b.above[i] > b.least[i]) {
                        list[n++] = i;
                        turn_query(ic, i);
                    }
                }
            }
            if (n > first) {
                project(list + first, n - first, 0, l.rank[XKV_K]);
            }
        }
        if (n == 0) {
            return;
        }
        for (int64_t t = 0; t < n_chunk; t += 16) {
            add_scores(ic, list, n, 0, t, 0, l.lead[XKV_K]);
        }
        int n_kept = 0;
        for (int k = 0; k < n; ++k) {
            const int64_t i = list[k];
            memcpy(rough(i), score(i), n_chunk * sizeof(float));
            l.cap(rough(i), n_chunk);
            mask_tail(ic, i, rough(i));
            if (mark(i)) {
                list[n_kept++] = i;
            }
        }
        n = n_kept;
        for (int64_t t = 0; t < n_chunk; t += 16) {
            add_scores(ic, some_of, some(list, n, t, t + 16, some_of), 0, t, l.lead[XKV_K], l.rank[XKV_K]);
        }
        for (int k = 0; k < n; ++k) {
            const int64_t i = list[k];
            l.cap(score(i), n_chunk);
            mask_tail(ic, i, score(i));
            raise_max(i, max_score(i));
            if (!b.parts.deep(part, i)) {
                b.parts.set_deep(part, i, true);
                memset(b.parts.sums(part, i) + l.lead[XKV_V], 0, (l.rank[XKV_V] - l.lead[XKV_V]) * sizeof(float));
            }
            weigh(i);
        }
        for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
            const auto &  seg  = l.segments[XKV_V][is];
            const int64_t cols = xkv_tile_cols(seg.type);
            for (int64_t t = 0; t < n_chunk; t += cols) {
                const int m = some(list, n, t, t + cols, some_of);
                add_values(ic, seg, b.taken, some_of, m, 0, t, t + cols, 0, l.lead[XKV_V]);
                add_values(ic, seg, b.weight, some_of, m, 0, t, t + cols, 0, l.rank[XKV_V]);
            }
        }
    }
};

void xkv_decode_refine(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part, int round) {
    for (int64_t ic = part; ic < l.n_frame; ic += n_part) {
        xkv_decode_refine_chunk(l, b, s, part).run(ic);
    }
    for (int64_t i = 0; i < l.n_query; ++i) {
        b.parts.add_up(part, i, round + 1);
    }
}
