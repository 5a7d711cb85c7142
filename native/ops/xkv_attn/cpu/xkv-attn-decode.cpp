// Few queries: they go to each chunk's frame and through the lead of the basis of K, and meet the coefficients as integers. A first
// pass counts all tokens by the lead, so that the size of each query's softmax is known; a second one takes back and counts again
// the blocks that hold more than the tolerance of it. Where that makes the softmax much smaller, since the lead had taken some
// tokens for more than they are, others hold more than the tolerance and are counted again as well. Chunks are in parts that sum
// apart; the sums are merged.

#include "xkv-decode-chunk.h"

static xkv_decode_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_decode_buffers b;
    xkv_arena          shared = { work };

    const int64_t n = l.n_query;
    b.tickets       = shared.take<xkv_ticket>(2 + XKV_N_ROUND);
    b.exact         = { nullptr, n, l.dim[XKV_V] };
    b.parts         = { nullptr, n, std::max(l.rank[XKV_V], l.dim[XKV_V]) };
    b.exact.data    = shared.take<float>(XKV_N_EXACT * n * (b.exact.n + XKV_PAD));
    b.parts.data    = shared.take<float>(xkv_n_part(l) * n * (b.parts.n + XKV_PAD));
    b.peak          = shared.take<float>(n * l.n_frame);

    const auto own = [&](xkv_arena a) {
        const auto rows = [&](int64_t width) {
            xkv_rows res;
            res.stride = (width + 31) / 32 * 32;
            res.x      = a.take<float>(n * res.stride);
            res.codes  = a.take<int8_t>(n * res.stride);
            res.scales = a.take<float>(n * res.stride / 32);
            res.n      = a.take<int32_t>(n * res.stride / 32);
            return res;
        };
        b.q      = rows(l.dim[XKV_K]);
        b.y      = rows(std::max(std::max(l.rank[XKV_K], l.rank[XKV_V]), l.dim[XKV_V]));
        b.weight = rows(l.n_chunk);
        b.taken  = rows(l.n_chunk);
        b.score  = a.take<float>(n * l.n_chunk);
        b.rough  = a.take<float>(n * l.n_chunk);
        b.least  = a.take<float>(n);
        b.above  = a.take<float>(n);
        b.fine   = a.take<uint8_t>(n * (l.n_chunk / XKV_ATTN_FINE + 1));
        b.row_k  = a.take<float>(XKV_EXACT_BLOCK * l.dim[XKV_K]);
        b.row_v  = a.take<float>(XKV_EXACT_BLOCK * l.dim[XKV_V]);
        return a.at;
    };
    const size_t size = own({ nullptr }) - (char *) nullptr;
    b.bytes           = (shared.at - work) + nth * size;
    own({ shared.at + ith * size });
    return b;
}

size_t xkv_attn_decode_bytes(const xkv_attn_layer & l, int nth) {
    return xkv_lay_out(l, nullptr, 0, nth).bytes + 64;
}

struct xkv_decode_lead_chunk : xkv_decode_chunk {
    using xkv_decode_chunk::xkv_decode_chunk;

    // weights of the chunk's tokens
    void weigh(int64_t ic, int64_t i) const {
        raise_max(i, max_score(i));
        const float max  = b.parts.max(part, i);
        float *     w    = b.weight.row(i);
        float       sum  = 0.0f;
        float       peak = 0.0f;
        for (int64_t t = 0; t < n_chunk; t += 16) {
            const f32r p = xkv_exp(xkv_load(score(i) + t) - max);
            xkv_store(w + t, p);
            const float block = xkv_sum(p);
            sum += block;
            peak = std::max(peak, block);
        }
        b.parts.sum(part, i) += sum;
        b.peak[i * l.n_frame + ic] = logf(peak) + max;
        b.weight.round(i, 0, n_chunk);
    }

    void run(int64_t ic) const {
        int64_t all[XKV_ATTN_MAX_QUERY * XKV_ATTN_MAX_HEADS]; // queries that see the chunk, by KV head
        int     first[XKV_ATTN_MAX_HEADS + 1];
        int     n = 0;
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            first[h] = n;
            for (int64_t t = 0; t < l.n_tps; ++t) {
                for (int64_t g = 0; g < l.n_gqa; ++g) {
                    const int64_t i = t * l.n_head + h * l.n_gqa + g;
                    if (l.n_fill(ic, t, s) > 0) {
                        all[n++] = i;
                    } else {
                        b.peak[i * l.n_frame + ic] = -INFINITY;
                    }
                }
            }
        }
        first[l.n_head_kv] = n;
        if (n == 0) {
            return;
        }
        const auto each_head = [&](auto && f) {
            for (int64_t h = 0; h < l.n_head_kv; ++h) {
                f(h, all + first[h], first[h + 1] - first[h]);
            }
        };
        // coefficients are the same for all heads, unless plain
        const auto each_list = [&](auto && f) {
            if (l.plain) {
                each_head(f);
            } else {
                f((int64_t) 0, all, n);
            }
        };
        for (int k = 0; k < n; ++k) {
            turn_query(ic, all[k]);
        }
        each_head([&](int64_t, const int64_t * list, int n_list) { project(list, n_list, 0, l.lead[XKV_K]); });
        each_list([&](int64_t h, const int64_t * list, int n_list) {
            for (int64_t t = 0; t < n_chunk; t += 16) {
                add_scores(ic, list, n_list, h, t, 0, l.lead[XKV_K]);
            }
        });
        for (int k = 0; k < n; ++k) {
            l.cap(score(all[k]), n_chunk);
            mask_tail(ic, all[k], score(all[k]));
            weigh(ic, all[k]);
        }
        each_list([&](int64_t h, const int64_t * list, int n_list) {
            for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
                add_values(ic, l.segments[XKV_V][is], b.weight, list, n_list, h, 0, n_chunk, 0, l.lead[XKV_V]);
            }
        });
    }
};

static void xkv_decode_lead(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t part, int64_t n_part) {
    for (int64_t i = 0; i < l.n_query; ++i) {
        memset(b.parts.sums(part, i), 0, l.lead[XKV_V] * sizeof(float));
        b.parts.max(part, i) = -INFINITY;
        b.parts.sum(part, i) = 0.0f;
        b.parts.set_deep(part, i, false);
    }
    for (int64_t ic = part; ic < l.n_frame; ic += n_part) {
        xkv_decode_lead_chunk(l, b, s, part).run(ic);
    }
    for (int64_t i = 0; i < l.n_query; ++i) {
        b.parts.add_up(part, i, 0);
    }
}

// log of the sum of weights by the lead from which on a block is refined
static float xkv_least(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t n_part, int64_t i, int round) {
    float max = l.sink(i);
    float sum = 0.0f;
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        max = std::max(max, b.exact.max(k, i));
    }
    for (int64_t k = 0; k < n_part; ++k) {
        max = std::max(max, b.parts.all(k, i, round));
    }
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        sum += b.exact.sum(k, i) > 0.0f ? b.exact.sum(k, i) * expf(b.exact.max(k, i) - max) : 0.0f;
    }
    for (int64_t k = 0; k < n_part; ++k) {
        sum += b.parts.all(k, i, round) > -INFINITY ? expf(b.parts.all(k, i, round) - max) : 0.0f;
    }
    sum += l.sinks ? expf(l.sink(i) - max) : 0.0f;
    return logf(sum * l.par.tolerance) + max;
}

// which blocks the round refines; false when none is left
static bool xkv_next_round(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t n_part, int round) {
    bool any = false;
    for (int64_t i = 0; i < l.n_query && round < XKV_N_ROUND; ++i) {
        const float least = xkv_least(l, b, n_part, i, round);
        if (round == 0 || least < b.least[i] - XKV_ROUND_LESS) {
            b.above[i] = round == 0 ? INFINITY : b.least[i];
            b.least[i] = least;
            any        = true;
        } else {
            b.above[i] = b.least[i];
        }
    }
    return any;
}

// sums of all parts of a query, through the basis of V
static void xkv_merge(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t n_part, int64_t i) {
    const int64_t n_v = l.dim[XKV_V];

    float max = l.sink(i);
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        max = std::max(max, b.exact.max(k, i));
    }
    for (int64_t k = 0; k < n_part; ++k) {
        max = b.parts.sum(k, i) != 0.0f ? std::max(max, b.parts.max(k, i)) : max;
    }
    float * o   = l.out(i, s);
    float   sum = l.sinks ? expf(l.sink(i) - max) : 0.0f;
    memset(o, 0, n_v * sizeof(float));
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        if (b.exact.sum(k, i) != 0.0f) { // or not a number, as below
            const float f = expf(b.exact.max(k, i) - max);
            sum += f * b.exact.sum(k, i);
            xkv_add_f32(n_v, f, b.exact.sums(k, i), o);
        }
    }
    if (n_part > 0) {
        float * acc = b.y.row(0); // of the thread, free by now
        memset(acc, 0, b.y.stride * sizeof(float));
        for (int64_t k = 0; k < n_part; ++k) {
            if (b.parts.sum(k, i) != 0.0f) {
                const float f = expf(b.parts.max(k, i) - max);
                sum += f * b.parts.sum(k, i);
                xkv_add_f32(b.parts.deep(k, i) ? l.rank[XKV_V] : l.lead[XKV_V], f, b.parts.sums(k, i), acc);
            }
        }
        if (l.plain) {
            xkv_add_f32(n_v, 1.0f, acc, o);
        } else {
            b.y.round(0, 0, l.rank[XKV_V]);
            const uint8_t * base = l.bases(XKV_V, l.head_kv(i));
            for (int64_t c = 0; c < n_v; c += 16) {
                f32r res = xkv_load(o + c);
                for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
                    const auto &      seg = l.segments[XKV_V][is];
                    const xkv_rounded y   = b.y.at(0, seg.first);
                    xkv_dot_tiles(1, seg.type_basis, base + seg.basis + c / 16 * xkv_tile_bytes(seg.type_basis, 16, seg.rank), seg.rank, &y,
                                  &res);
                }
                xkv_store(o + c, res);
            }
        }
    }
    xkv_scale_f32(n_v, sum == 0.0f ? 0.0f : 1.0f / sum, o);
}

void xkv_attn_decode(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user) {
    const xkv_decode_buffers b = xkv_lay_out(l, work, ith, nth);

    const int64_t n_part  = xkv_n_part(l);
    const int64_t n_exact = l.n_head_kv * XKV_N_EXACT;
    const bool    rest    = l.lead[XKV_K] < l.rank[XKV_K] || l.lead[XKV_V] < l.rank[XKV_V];
    for (int64_t s = 0; s < l.n_stream; ++s) {
        if (ith == 0) {
            for (int i = 0; i < 2 + XKV_N_ROUND; ++i) {
                b.tickets[i].reset();
            }
        }
        barrier(user);
        for (int64_t u = b.tickets[0].next(); u < n_part + n_exact; u = b.tickets[0].next()) {
            if (u < n_part) {
                xkv_decode_lead(l, b, s, u, n_part);
            } else {
                const int64_t e = (u - n_part) % XKV_N_EXACT;
                xkv_exact_span(l, b, s, (u - n_part) / XKV_N_EXACT, e, l.n_exact * e / XKV_N_EXACT, l.n_exact * (e + 1) / XKV_N_EXACT);
            }
        }
        barrier(user);
        // all threads find the same rounds
        for (int round = 0; n_part > 0 && rest && xkv_next_round(l, b, n_part, round); ++round) {
            for (int64_t u = b.tickets[2 + round].next(); u < n_part; u = b.tickets[2 + round].next()) {
                xkv_decode_refine(l, b, s, u, n_part, round);
            }
            barrier(user);
        }
        for (int64_t u = b.tickets[1].next(); u < l.n_query; u = b.tickets[1].next()) {
            xkv_merge(l, b, s, n_part, u);
        }
        if (s + 1 < l.n_stream) {
            barrier(user);
        }
    }
}
