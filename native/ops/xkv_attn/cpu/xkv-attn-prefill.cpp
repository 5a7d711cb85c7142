// Many queries: K and V of a batch of tokens are made for all KV heads, in f32 tiles, meet all queries and are forgotten. Each query
// keeps a running max and sum, and its output is where the sums are. Both steps are dealt to the threads anew for each batch; what a
// unit computes does not depend on how they are dealt.

#include "xkv-prefill.h"

static int64_t xkv_n_tile(int64_t n_token) {
    return (n_token + XKV_TILE_TOKENS - 1) / XKV_TILE_TOKENS;
}

static xkv_prefill_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_prefill_buffers b;

    const int64_t dk = xkv_pad16(l.dim[XKV_K]);
    const int64_t dv = xkv_pad16(l.dim[XKV_V]);
    const int64_t rk = xkv_pad16(l.rank[XKV_K]);
    const int64_t rv = xkv_pad16(l.rank[XKV_V]);

    xkv_arena shared = { work };
    b.state          = shared.take<float>(2 * l.n_query);
    b.kt             = shared.take<float>(l.n_head_kv * XKV_BATCH_TILES * XKV_TILE_TOKENS * dk);
    b.vt             = shared.take<float>(l.n_head_kv * XKV_BATCH_TILES * XKV_TILE_TOKENS * dv);

    const auto own = [&](xkv_arena a) {
        b.base_k = a.take<float>(dk * rk);
        b.base_v = a.take<float>(rv * dv);
        // a tile of coefficients has up to 128 columns
        b.coef_k = a.take<float>((rk + 128) * XKV_TILE_TOKENS);
        // and begins up to a tile of tokens before
        b.coef_v = a.take<float>(rv * (XKV_TILE_TOKENS + 128)) + rv * XKV_TILE_TOKENS;
        b.s      = a.take<float>(XKV_MUL_ROWS * XKV_TILE_TOKENS);
        b.q      = a.take<float>(XKV_UNIT_ROWS * dk);
        b.tiles  = a.take<xkv_tile_of>(l.n_frame * xkv_n_tile(l.n_chunk) + xkv_n_tile(l.n_exact));
        return a.at;
    };
    const size_t size = own({ nullptr }) - (char *) nullptr;
    b.bytes           = (shared.at - work) + nth * size;
    own({ shared.at + ith * size });
    return b;
}

size_t xkv_attn_prefill_bytes(const xkv_attn_layer & l, int nth) {
    return xkv_lay_out(l, nullptr, 0, nth).bytes + 64;
}

struct xkv_prefill : xkv_prefill_head {
    // query j of the KV head's
    int64_t query(int64_t j) const { return j / l.n_gqa * l.n_head + head * l.n_gqa + j % l.n_gqa; }

    // what is added to a query's scores: nullptr for nothing; false when it sees none of the tile
    bool see(const xkv_tile_of & tile, int64_t t, float * bias, const float *& add) const {
        add = nullptr;
        if (tile.ic >= 0) {
            const int64_t fill = l.n_fill(tile.ic, t, s) - tile.first;
            if (fill < tile.n) {
                for (int64_t i = 0; i < tile.n; ++i) {
                    bias[i] = i < fill ? 0.0f : -INFINITY;
                }
                add = bias;
            }
            return fill > 0;
        }
        bool any = false;
        bool all = tile.n == tile.n_pad;
        for (int64_t i = 0; i < tile.n_pad; ++i) {
            bias[i] = i < tile.n ? l.mask_at(tile.first + i, t, s) : -INFINITY;
            any     = any || bias[i] > -INFINITY;
            all     = all && bias[i] == 0.0f;
        }
        add = all ? nullptr : bias;
        return any;
    }

    // queries [j0, j1) of the head, a unit
    void load_queries(int64_t j0, int64_t j1) const {
        for (int64_t j = j0; j < j1; ++j) {
            const float * q = l.query(query(j), s);
            for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                b.q[(j - j0) * dk + d] = q[d] * l.par.scale;
            }
        }
    }

    // they meet a tile
    void attend(const xkv_tile_of & tile, int64_t it, int64_t j0, int64_t j1) const {
        const int64_t n = tile.n_pad;

        float         bias[XKV_MUL_ROWS][XKV_TILE_TOKENS];
        int64_t       bias_of = -1; // token of the batch that the last bias is of
        int           n_bias  = 0;
        bool          seen    = false;
        const float * add     = nullptr;
        for (int64_t j = j0; j < j1; j += XKV_MUL_ROWS) {
            int m = 0;

            const float * adds[XKV_MUL_ROWS];
            float *       state[XKV_MUL_ROWS];
            float *       o[XKV_MUL_ROWS];
            const float * a[XKV_MUL_ROWS];
            float *       c[XKV_MUL_ROWS];
            n_bias  = 0;
            bias_of = -1;
            for (int64_t k = j; k < std::min(j + XKV_MUL_ROWS, j1); ++k) {
                const int64_t t = k / l.n_gqa;
                if (t != bias_of) {
                    seen    = see(tile, t, bias[n_bias++], add);
                    bias_of = t;
                }
                if (!seen) {
                    continue;
                }
                adds[m]  = add;
                state[m] = b.state + 2 * query(k);
                o[m]     = l.out(query(k), s);
                a[m]     = b.q + (k - j0) * dk;
                c[m]     = b.s + m * XKV_TILE_TOKENS;
                m++;
            }
            if (m == 0) {
                continue;
            }
            xkv_mul<false>(m, l.dim[XKV_K], n, a, kt(it), n, c);
            for (int i = 0; i < m; ++i) {
                l.cap(c[i], n);
                f32r top = xkv_set1(-INFINITY);
                for (int64_t t = 0; t < n; t += 16) {
                    f32r x = xkv_load(c[i] + t);
                    if (adds[i]) {
                        x += xkv_load(adds[i] + t);
                        xkv_store(c[i] + t, x);
                    }
                    top = xkv_max(top, x);
                }
                const float old = state[i][0];
                const float max = std::max(old, xkv_max(top));
                if (max > old) {
                    const float f = old == -INFINITY ? 0.0f : expf(old - max);
                    for (int64_t d = 0; d < dv; d += 16) {
                        xkv_store(o[i] + d, xkv_load(o[i] + d) * f);
                    }
                    state[i][0] = max;
                    state[i][1] *= f;
                }
                // a score that is not a number leaves the max alone, and has to show
                const float from = max == -INFINITY ? 0.0f : max;
                f32r        sum  = {};
                for (int64_t t = 0; t < n; t += 16) {
                    const f32r p = xkv_exp(xkv_load(c[i] + t) - from);
                    xkv_store(c[i] + t, p);
                    sum += p;
                }
                state[i][1] += xkv_sum(sum);
            }
            xkv_mul<true>(m, n, dv, c, vt(it), dv, o);
        }
    }
};

// All tiles of a stream: stored tokens that a query sees, then exact ones; returns how many. Not in memory that is asked for: no
// exception may leave an op.
static int64_t xkv_list_tiles(const xkv_attn_layer & l, int64_t s, xkv_tile_of * tiles) {
    int64_t res = 0;
    for (int64_t ic = 0; ic < l.n_frame; ++ic) {
        int64_t most = 0;
        for (int64_t t = 0; t < l.n_tps; ++t) {
            most = std::max(most, l.n_fill(ic, t, s));
        }
        for (int64_t t0 = 0; t0 < most; t0 += XKV_TILE_TOKENS) {
            const int64_t n = std::min(XKV_TILE_TOKENS, l.n_chunk - t0);
            tiles[res++]    = { ic, t0, n, n };
        }
    }
    for (int64_t j = 0; j < l.n_exact; j += XKV_TILE_TOKENS) {
        const int64_t n = std::min(XKV_TILE_TOKENS, l.n_exact - j);
        tiles[res++]    = { -1, j, n, xkv_pad16(n) };
    }
    return res;
}

void xkv_attn_prefill(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user) {
    const xkv_prefill_buffers b = xkv_lay_out(l, work, ith, nth);

    const int64_t n_row  = l.n_gqa * l.n_tps;
    const int64_t n_unit = (n_row + XKV_UNIT_ROWS - 1) / XKV_UNIT_ROWS;
    for (int64_t s = 0; s < l.n_stream; ++s) {
        const xkv_tile_of * tiles   = b.tiles;
        const int64_t       n_tiles = xkv_list_tiles(l, s, b.tiles);

        int64_t u0, u1;
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        for (int64_t i = u0; i < u1; ++i) {
            memset(l.out(i, s), 0, l.dim[XKV_V] * sizeof(float));
            b.state[2 * i]     = -INFINITY;
            b.state[2 * i + 1] = 0.0f;
        }
        for (int64_t first = 0; first < n_tiles; first += XKV_BATCH_TILES) {
            const int64_t n_tile = std::min(XKV_BATCH_TILES, n_tiles - first);

            xkv_share(l.n_head_kv * n_tile, ith, nth, &u0, &u1);
            int64_t expanded = -1;
            for (int64_t u = u0; u < u1; ++u) {
                const xkv_prefill_head h{ l, b, s, u / n_tile };
                const auto &           tile = tiles[first + u % n_tile];
                if (!l.plain && tile.ic >= 0 && expanded != h.head) {
                    xkv_prefill_expand_bases(h);
                    expanded = h.head;
                }
                xkv_prefill_make(h, tile, u % n_tile);
            }
            barrier(user);
            xkv_share(l.n_head_kv * n_unit, ith, nth, &u0, &u1);
            for (int64_t u = u0; u < u1; ++u) {
                const xkv_prefill p{ { l, b, s, u / n_unit } };
                const int64_t     j0 = u % n_unit * XKV_UNIT_ROWS;
                const int64_t     j1 = std::min(j0 + XKV_UNIT_ROWS, n_row);
                p.load_queries(j0, j1);
                for (int64_t it = 0; it < n_tile; ++it) {
                    p.attend(tiles[first + it], it, j0, j1);
                }
            }
            barrier(user);
        }
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        for (int64_t i = u0; i < u1; ++i) {
            const float max  = std::max(b.state[2 * i], l.sink(i));
            const float kept = max == -INFINITY ? 0.0f : expf(b.state[2 * i] - max);
            const float sum  = kept * b.state[2 * i + 1] + (l.sinks ? expf(l.sink(i) - max) : 0.0f);
            float *     o    = l.out(i, s);
            for (int64_t d = 0; d < l.dim[XKV_V]; ++d) {
                o[d] *= sum == 0.0f ? 0.0f : kept / sum;
            }
        }
        barrier(user);
    }
}
