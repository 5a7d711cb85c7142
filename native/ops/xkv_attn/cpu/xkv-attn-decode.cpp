// Few queries: they go to each chunk's frame and through the lead of the basis of K, and meet the coefficients as integers. A first
// pass counts all tokens by the lead, so that the size of each query's softmax is known; a second one takes back and counts again
// the blocks that hold more than the tolerance of it. Where that makes the softmax much smaller, since the lead had taken some
// tokens for more than they are, others hold more than the tolerance and are counted again as well. Chunks are in parts that sum
// apart; the sums are merged.

#include "xkv-decode-chunk.h"

static xkv_decode_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_decode_buffers b;
    xkv_arena          shared = { work };

    const int64_t n     = l.n_query;
    const int64_t n_row = n + XKV_N_PENDING;
    b.tickets           = shared.take<xkv_ticket>(XKV_N_TICKET + XKV_N_ROUND);
    b.exact             = { nullptr, n, l.dim[XKV_V] };
    b.parts             = { nullptr, n, std::max(l.rank[XKV_V], l.dim[XKV_V]) };
    b.exact.data        = shared.take<float>(XKV_N_EXACT * n * (b.exact.n + XKV_PAD));
    b.parts.data        = shared.take<float>(xkv_n_part(l) * n * (b.parts.n + XKV_PAD));
    b.peak              = shared.take<float>(n * l.n_frame);

    const auto own = [&](xkv_arena a) {
        const auto rows = [&](int64_t width) {
            xkv_rows res;
            res.stride = (width + 31) / 32 * 32;
            res.x      = a.take<float>(n_row * res.stride);
            res.codes  = a.take<int8_t>(n_row * res.stride);
            res.scales = a.take<float>(n_row * res.stride / 32);
            res.n      = a.take<int32_t>(n_row * res.stride / 32);
            return res;
        };
        b.q      = rows(l.dim[XKV_K]);
        b.y      = rows(std::max(std::max(l.rank[XKV_K], l.rank[XKV_V]), l.dim[XKV_V]));
        b.weight = rows(l.n_chunk);
        b.taken  = rows(l.n_chunk);
        b.score  = a.take<float>(n_row * l.n_chunk);
        b.rough  = a.take<float>(n_row * l.n_chunk);
        b.least  = a.take<float>(n);
        b.above  = a.take<float>(n);
        b.fine   = a.take<uint8_t>(n_row * (l.n_chunk / XKV_ATTN_FINE + 1));
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
            const int64_t first = 0;
            b.y.round(&first, 1, 0, l.rank[XKV_V]);
            const uint8_t * base = l.bases(XKV_V, l.head_kv(i));
            for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
                const auto &      seg  = l.segments[XKV_V][is];
                const xkv_rounded y    = b.y.at(0, seg.first);
                const size_t      tile = xkv_tile_bytes(seg.type_basis, 16, seg.rank);
                xkv_dot_blocks(1, seg.type_basis, { base + seg.basis, tile, n_v / 16 }, seg.rank, &y, &o);
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
            for (int i = 0; i < XKV_N_TICKET + XKV_N_ROUND; ++i) {
                b.tickets[i].reset();
            }
        }
        barrier(user);
        for (int64_t u = b.tickets[XKV_TICKET_EXACT].next(); u < n_exact; u = b.tickets[XKV_TICKET_EXACT].next()) {
            const int64_t e = u % XKV_N_EXACT;
            xkv_exact_span(l, b, s, u / XKV_N_EXACT, e, l.n_exact * e / XKV_N_EXACT, l.n_exact * (e + 1) / XKV_N_EXACT);
        }
        barrier(user);
        for (int64_t i = 0; i < l.n_query; ++i) {
            b.least[i] = xkv_least(l, b, 0, i, 0);
        }
        for (int64_t u = b.tickets[XKV_TICKET_LEAD].next(); u < n_part; u = b.tickets[XKV_TICKET_LEAD].next()) {
            xkv_decode_lead(l, b, s, u, n_part);
        }
        barrier(user);

        // all threads find the same rounds
        for (int round = 0; n_part > 0 && rest && xkv_next_round(l, b, n_part, round); ++round) {
            for (int64_t u = b.tickets[XKV_N_TICKET + round].next(); u < n_part; u = b.tickets[XKV_N_TICKET + round].next()) {
                xkv_decode_refine(l, b, s, u, n_part, round);
            }
            barrier(user);
        }

        for (int64_t u = b.tickets[XKV_TICKET_MERGE].next(); u < l.n_query; u = b.tickets[XKV_TICKET_MERGE].next()) {
            xkv_merge(l, b, s, n_part, u);
        }

        if (s + 1 < l.n_stream) {
            barrier(user);
        }
    }
}
