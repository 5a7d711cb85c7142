// Decoding: what the lead has counted roughly is counted again with all directions, in blocks of tokens that hold more than the
// tolerance of a query's softmax.

#include "xkv-decode-chunk.h"

struct xkv_decode_refine_rows : xkv_decode_rows {
    using xkv_decode_rows::xkv_decode_rows;

    const uint8_t * fine(int64_t row) const { return b.fine + row * n_fine; }

    float * rough(int64_t row) const { return b.rough + row * n_chunk; }

    // marks the blocks of a row that are refined
    bool mark(int64_t row) const {
        const int64_t i     = queries[row];
        const float   max   = b.parts.max(part, i);
        const float   least = expf(b.least[i] - max);
        const float   above = expf(b.above[i] - max);
        bool          any   = false;
        for (int64_t f = 0; f < n_fine; ++f) {
            const float sum          = xkv_sum(xkv_exp(xkv_load(rough(row) + 16 * f) - max));
            b.fine[row * n_fine + f] = sum > least && sum <= above;
            any                      = any || b.fine[row * n_fine + f];
        }
        return any;
    }

    // weights of refined blocks, and those by the lead, rounded as they were when they were added
    void weigh(int64_t row) const {
        const int64_t i   = queries[row];
        const float   max = b.parts.max(part, i);
        float *       w   = b.weight.row(row);
        float *       r   = b.taken.row(row);
        f32r          sum = {};
        for (int64_t f = 0; f < n_fine; ++f) {
            const f32r led = xkv_exp(xkv_load(rough(row) + 16 * f) - max);
            f32r       p   = {};
            if (fine(row)[f]) {
                p = xkv_exp(xkv_load(score(row) + 16 * f) - max);
                sum += p - led;
            }
            xkv_store(w + 16 * f, p);
            xkv_store(r + 16 * f, led);
        }
        b.parts.sum(part, i) += xkv_sum(sum);
    }

    // those of rows whose blocks in tokens [t0, t1) are refined, and their queries
    int some(const int64_t * rows, int n_rows, int64_t t0, int64_t t1, int64_t * res, int64_t * of) const {
        int n_res = 0;
        for (int k = 0; k < n_rows; ++k) {
            bool any = false;
            for (int64_t f = t0 / XKV_ATTN_FINE; f < std::min(t1 / XKV_ATTN_FINE, n_fine); ++f) {
                any = any || fine(rows[k])[f];
            }
            if (any) {
                of[n_res]    = queries[rows[k]];
                res[n_res++] = rows[k];
            }
        }
        return n_res;
    }

    // takes the chunk's queries with blocks to refine
    void take(int64_t ic) {
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            for (int64_t t = 0; t < l.n_tps; ++t) {
                for (int64_t g = 0; g < l.n_gqa; ++g) {
                    const int64_t i = t * l.n_head + h * l.n_gqa + g;
                    if (b.peak[i * l.n_frame + ic] > b.least[i] && b.above[i] > b.least[i]) {
                        push(ic, i);
                    }
                }
            }
        }
    }

    // rows [r0, r1), which are of one chunk
    void refine(int64_t ic, int r0, int r1) const {
        int64_t list[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];
        int64_t some_of[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];
        int64_t query_of[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];

        const int n_all = r1 - r0;
        for (int k = 0; k < n_all; ++k) {
            list[k] = r0 + k;
        }
        add_scores(ic, list, n_all, 0, 0, n_chunk, 0, l.lead[XKV_K]);
        int n_list = 0;
        for (int row = r0; row < r1; ++row) {
            memcpy(rough(row), score(row), n_chunk * sizeof(float));
            l.cap(rough(row), n_chunk);
            mask_tail(ic, queries[row], rough(row));
            if (mark(row)) {
                list[n_list++] = row;
            }
        }
        for (int64_t t = 0; t < n_chunk; t += 16) {
            add_scores(ic, some_of, some(list, n_list, t, t + 16, some_of, query_of), 0, t, t + 16, l.lead[XKV_K], l.rank[XKV_K]);
        }
        for (int k = 0; k < n_list; ++k) {
            const int64_t row = list[k];
            const int64_t i   = queries[row];
            l.cap(score(row), n_chunk);
            mask_tail(ic, i, score(row));
            raise_max(i, max_score(row));
            if (!b.parts.deep(part, i)) {
                b.parts.set_deep(part, i, true);
                memset(b.parts.sums(part, i) + l.lead[XKV_V], 0, (l.rank[XKV_V] - l.lead[XKV_V]) * sizeof(float));
            }
            weigh(row);
        }
        b.weight.round(list, n_list, 0, n_chunk);
        b.taken.round(list, n_list, 0, n_chunk);
        for (int k = 0; k < n_list; ++k) {
            b.taken.negate(list[k], n_chunk);
            for (int64_t f = 0; f < n_fine; ++f) {
                if (!fine(list[k])[f]) {
                    b.taken.clear(list[k], 16 * f);
                }
            }
        }
        for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
            const auto &  seg  = l.segments[XKV_V][is];
            const int64_t cols = xkv_tile_cols(seg.type);
            for (int64_t t = 0; t < n_chunk; t += cols) {
                const int m = some(list, n_list, t, t + cols, some_of, query_of);
                add_values(ic, seg, b.taken, some_of, query_of, m, 0, t, t + cols, 0, l.lead[XKV_V]);
                add_values(ic, seg, b.weight, some_of, query_of, m, 0, t, t + cols, 0, l.rank[XKV_V]);
            }
        }
    }

    void flush() {
        project_all(l.rank[XKV_K]);
        each_chunk([&](int64_t ic, int r0, int r1) { refine(ic, r0, r1); });
        n = 0;
    }
};

void xkv_decode_refine(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part, int round) {
    xkv_decode_refine_rows refine(l, b, s, part);
    for (int64_t ic = part; ic < l.n_frame; ic += n_part) {
        refine.take(ic);
        if (refine.n > XKV_N_PENDING) {
            refine.flush();
        }
    }
    refine.flush();
    for (int64_t i = 0; i < l.n_query; ++i) {
        b.parts.add_up(part, i, round + 1);
    }
}
