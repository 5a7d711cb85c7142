// Decoding: all tokens by the lead of the directions.

#include "xkv-decode-chunk.h"

// Chunks whose tokens hold next to nothing count in the softmax, not in the sums: V is its mean there. Together they hold less than
// XKV_N_SKIP tolerances, and each less than half of one, so that none is refined: what the lead added is taken back then.
static const float XKV_N_SKIP    = 10.0f;
static const float XKV_SKIP_MOST = 0.5f;

struct xkv_decode_lead_rows : xkv_decode_rows {
    using xkv_decode_rows::xkv_decode_rows;

    // V has no mean beside sinks, and none while it is plain
    const float skip = l.plain || l.sinks ? -INFINITY : logf(std::min(XKV_SKIP_MOST, XKV_N_SKIP / l.n_frame));

    // chunks whose queries go through the basis together: as many as one product takes
    const int64_t n_together = std::max<int64_t>(1, std::min((l.n_query + XKV_N_PENDING) / l.n_query, XKV_DOT_MAX / (l.n_gqa * l.n_tps)));

    // the chunk's queries
    void take(int64_t ic) {
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            for (int64_t t = 0; t < l.n_tps; ++t) {
                const bool seen = l.n_fill(ic, t, s) > 0;
                for (int64_t g = 0; g < l.n_gqa; ++g) {
                    const int64_t i = t * l.n_head + h * l.n_gqa + g;
                    if (seen) {
                        push(ic, i);
                    } else {
                        b.peak[i * l.n_frame + ic] = -INFINITY;
                    }
                }
            }
        }
    }

    // weights of the chunk's tokens; list becomes the rows whose weights are not next to nothing
    int weigh(int64_t ic, int64_t * list, int n_list) const {
        int n_kept = 0;
        for (int k0 = 0; k0 < n_list; k0 += 16) {
            const int n = std::min(n_list - k0, 16);
            float     peak[16];
            float     total[16];
            float     max[16];
            for (int k = 0; k < 16; ++k) {
                peak[k] = total[k] = 1.0f;
                max[k]             = 0.0f;
            }
            for (int k = 0; k < n; ++k) {
                const int64_t row = list[k0 + k];
                const int64_t i   = queries[row];
                raise_max(i, max_score(row));
                max[k]  = b.parts.max(part, i);
                peak[k] = total[k] = 0.0f;
                for (int64_t t = 0; t < n_chunk; t += 64) {
                    f32r  p[4] = {};
                    float sum[4];
                    for (int64_t u = t; u < std::min(t + 64, n_chunk); u += 16) {
                        p[(u - t) / 16] = xkv_exp(xkv_load(score(row) + u) - max[k]);
                        xkv_store(b.weight.row(row) + u, p[(u - t) / 16]);
                    }
                    xkv_sum_4(p, sum);
                    total[k] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
                    peak[k] = std::max(peak[k], std::max(std::max(sum[0], sum[1]), std::max(sum[2], sum[3])));
                }
                b.parts.sum(part, i) += total[k];
            }
            xkv_store(peak, xkv_log(xkv_load(peak)) + xkv_load(max));
            xkv_store(total, xkv_log(xkv_load(total)) + xkv_load(max));
            for (int k = 0; k < n; ++k) {
                const int64_t row = list[k0 + k];
                const int64_t i   = queries[row];

                b.peak[i * l.n_frame + ic] = peak[k];
                if (!(total[k] < b.least[i] + skip)) {
                    list[n_kept++] = row;
                }
            }
        }
        b.weight.round(list, n_kept, 0, n_chunk);
        return n_kept;
    }

    // rows [r0, r1), which are of one chunk
    void count(int64_t ic, int r0, int r1) const {
        int64_t list[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];
        int64_t query_of[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS];

        int n_list = r1 - r0;
        for (int k = 0; k < n_list; ++k) {
            list[k] = r0 + k;
        }
        // coefficients are the same for all heads, unless plain
        const auto each_list = [&](auto && f) {
            for (int k0 = 0, k1 = 0; k0 < n_list; k0 = k1) {
                const int64_t h = l.head_kv(queries[list[k0]]);
                while (k1 < n_list && (!l.plain || l.head_kv(queries[list[k1]]) == h)) {
                    ++k1;
                }
                f(h, k0, k1 - k0);
            }
        };
        each_list([&](int64_t h, int k0, int n_same) { add_scores(ic, list + k0, n_same, h, 0, n_chunk, 0, l.lead[XKV_K]); });
        for (int k = 0; k < n_list; ++k) {
            l.cap(score(list[k]), n_chunk);
            mask_tail(ic, queries[list[k]], score(list[k]));
        }
        n_list = weigh(ic, list, n_list);
        for (int k = 0; k < n_list; ++k) {
            query_of[k] = queries[list[k]];
        }
        each_list([&](int64_t h, int k0, int n_same) {
            for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
                add_values(ic, l.segments[XKV_V][is], b.weight, list + k0, query_of + k0, n_same, h, 0, n_chunk, 0, l.lead[XKV_V]);
            }
        });
    }

    void flush() {
        project_all(l.lead[XKV_K]);
        each_chunk([&](int64_t ic, int r0, int r1) { count(ic, r0, r1); });
        n = 0;
    }
};

void xkv_decode_lead(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part) {
    for (int64_t i = 0; i < l.n_query; ++i) {
        memset(b.parts.sums(part, i), 0, l.lead[XKV_V] * sizeof(float));
        b.parts.max(part, i) = -INFINITY;
        b.parts.sum(part, i) = 0.0f;
        b.parts.set_deep(part, i, false);
    }
    xkv_decode_lead_rows lead(l, b, s, part);

    int64_t n_taken = 0;
    for (int64_t ic = part; ic < l.n_frame; ic += n_part) {
        lead.take(ic);
        if (++n_taken % lead.n_together == 0) {
            lead.flush();
        }
    }
    lead.flush();
    for (int64_t i = 0; i < l.n_query; ++i) {
        b.parts.add_up(part, i, 0);
    }
}
