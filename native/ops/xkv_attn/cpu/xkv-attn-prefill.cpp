// Many queries: K and V of a batch of tokens are made for all KV heads, in f32 tiles, meet all queries and are forgotten. Each query
// keeps a running max and sum, and its output is where the sums are. Both steps are dealt to the threads anew for each batch; what a
// unit computes does not depend on how they are dealt.

#include "xkv-attn-layer.h"

#include <vector>

// tokens of a tile, and tiles of a batch
static const int64_t XKV_TILE_TOKENS = 64;
static const int64_t XKV_BATCH_TILES = 8;

// queries of a KV head that one thread takes at a time: a multiple of the rows that meet a tile together
static const int64_t XKV_UNIT_ROWS = 16*XKV_MUL_ROWS;

static int64_t xkv_pad16(int64_t n) {
    return (n + 15)/16*16;
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

    size_t bytes;
};

static xkv_prefill_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_prefill_buffers b;

    const int64_t dk = xkv_pad16(l.dim[XKV_K]);
    const int64_t dv = xkv_pad16(l.dim[XKV_V]);
    const int64_t rk = xkv_pad16(l.rank[XKV_K]);
    const int64_t rv = xkv_pad16(l.rank[XKV_V]);

    xkv_arena shared = { work };
    b.state = shared.take<float>(2*l.n_query);
    b.kt    = shared.take<float>(l.n_head_kv*XKV_BATCH_TILES*XKV_TILE_TOKENS*dk);
    b.vt    = shared.take<float>(l.n_head_kv*XKV_BATCH_TILES*XKV_TILE_TOKENS*dv);

    const auto own = [&](xkv_arena a) {
        b.base_k = a.take<float>(dk*rk);
        b.base_v = a.take<float>(rv*dv);
        // a tile of coefficients has up to 128 columns
        b.coef_k = a.take<float>((rk + 128)*XKV_TILE_TOKENS);
        b.coef_v = a.take<float>(rv*(XKV_TILE_TOKENS + 128));
        b.s      = a.take<float>(XKV_MUL_ROWS*XKV_TILE_TOKENS);
        b.q      = a.take<float>(XKV_UNIT_ROWS*dk);
        return a.at;
    };
    const size_t size = own({ nullptr }) - (char *) nullptr;
    b.bytes = (shared.at - work) + nth*size;
    own({ shared.at + ith*size });
    return b;
}

size_t xkv_attn_prefill_bytes(const xkv_attn_layer & l, int nth) {
    return xkv_lay_out(l, nullptr, 0, nth).bytes + 64;
}

template <int M, int NV, bool ADD>
static inline void xkv_mul_block(int64_t n, const float * const * a, const float * b, int64_t ldb, float * const * c) {
    f32r acc[M][NV];
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < NV; ++v) {
            acc[m][v] = ADD ? xkv_load(c[m] + 16*v) : f32r{};
        }
    }
    xkv_mul_panel<M, NV>(n, a, b, ldb, acc);
    for (int m = 0; m < M; ++m) {
        for (int v = 0; v < NV; ++v) {
            xkv_store(c[m] + 16*v, acc[m][v]);
        }
    }
}

template <int NV, bool ADD>
static inline void xkv_mul_rows(int m, int64_t n, const float * const * a, const float * b, int64_t ldb, float * const * c) {
    switch (m) {
        case 1: xkv_mul_block<1, NV, ADD>(n, a, b, ldb, c); break;
        case 2: xkv_mul_block<2, NV, ADD>(n, a, b, ldb, c); break;
        case 3: xkv_mul_block<3, NV, ADD>(n, a, b, ldb, c); break;
        case 4: xkv_mul_block<4, NV, ADD>(n, a, b, ldb, c); break;
        case 5: xkv_mul_block<5, NV, ADD>(n, a, b, ldb, c); break;
        case 6: xkv_mul_block<6, NV, ADD>(n, a, b, ldb, c); break;
    }
}

// c[m][0 .. n_col) (+)= sum over k < n of a[m][k] times row k of b; up to XKV_MUL_ROWS rows, n_col a multiple of 16
template <bool ADD>
static void xkv_mul(int m, int64_t n, int64_t n_col, const float * const * a, const float * b, int64_t ldb, float * const * c0) {
    float * c[XKV_MUL_ROWS];
    for (int64_t j = 0; j < n_col;) {
        for (int i = 0; i < m; ++i) {
            c[i] = c0[i] + j;
        }
        const int64_t rest = (n_col - j)/16;
        if (XKV_MUL_VECS >= 4 && rest >= 4) {
            xkv_mul_rows<XKV_MUL_VECS, ADD>(m, n, a, b + j, ldb, c);
            j += 16*XKV_MUL_VECS;
        } else if (XKV_MUL_VECS >= 4 && rest >= 2) {
            xkv_mul_rows<2, ADD>(m, n, a, b + j, ldb, c);
            j += 32;
        } else {
            xkv_mul_rows<1, ADD>(m, n, a, b + j, ldb, c);
            j += 16;
        }
    }
}

struct xkv_prefill {
    const xkv_attn_layer &      l;
    const xkv_prefill_buffers & b;

    const int64_t s;
    const int64_t head; // KV head

    const int64_t dk = xkv_pad16(l.dim[XKV_K]);
    const int64_t dv = xkv_pad16(l.dim[XKV_V]);
    const int64_t rk = xkv_pad16(l.rank[XKV_K]);
    const int64_t rv = xkv_pad16(l.rank[XKV_V]);

    // query j of the KV head's
    int64_t query(int64_t j) const { return j/l.n_gqa*l.n_head + head*l.n_gqa + j % l.n_gqa; }

    float * kt(int64_t tile) const { return b.kt + (head*XKV_BATCH_TILES + tile)*XKV_TILE_TOKENS*dk; }
    float * vt(int64_t tile) const { return b.vt + (head*XKV_BATCH_TILES + tile)*XKV_TILE_TOKENS*dv; }

    // the head's bases as f32
    void expand_bases() const {
        for (int kd = 0; kd < 2; ++kd) {
            for (int is = 0; is < l.n_segment[kd]; ++is) {
                const auto &    seg  = l.segments[kd][is];
                const int64_t   cols = xkv_tile_cols(seg.type_basis);
                const size_t    tile = xkv_tile_bytes(seg.type_basis, 16, cols);
                const uint8_t * p    = l.bases(kd, head) + seg.basis;
                if (kd == XKV_K) {
                    for (int64_t r = 0; r < seg.rank; r += 16) {
                        for (int64_t c = 0; c < l.dim[XKV_K]; c += cols, p += tile) {
                            xkv_expand_tile(seg.type_basis, p, b.base_k + c*rk + seg.first + r, rk);
                        }
                    }
                } else {
                    for (int64_t c = 0; c < l.dim[XKV_V]; c += 16) {
                        for (int64_t r = 0; r < seg.rank; r += cols, p += tile) {
                            xkv_expand_tile(seg.type_basis, p, b.base_v + (seg.first + r)*dv + c, dv);
                        }
                    }
                }
            }
        }
    }

    // coefficients of a chunk's tokens [t0, t0 + n) as f32: K [rank][n], V [n][rank]
    void expand_coef(int64_t ic, int64_t t0, int64_t n) const {
        for (int kd = 0; kd < 2; ++kd) {
            for (int is = 0; is < l.n_segment[kd]; ++is) {
                const auto &    seg  = l.segments[kd][is];
                const int64_t   cols = xkv_tile_cols(seg.type);
                const size_t    tile = xkv_tile_bytes(seg.type, 16, cols);
                const uint8_t * p    = l.chunk(ic, s) + seg.coef + (l.plain ? head*l.head_coef[kd] : 0);
                if (kd == XKV_K) {
                    for (int64_t t = 0; t < n; t += 16) {
                        const uint8_t * q = p + (t0 + t)/16*xkv_tile_bytes(seg.type, 16, seg.rank);
                        for (int64_t r = 0; r < seg.rank; r += cols, q += tile) {
                            xkv_expand_tile(seg.type, q, b.coef_k + (seg.first + r)*n + t, n);
                        }
                    }
                } else {
                    for (int64_t r = 0; r < seg.rank; r += 16) {
                        const uint8_t * q = p + r/16*xkv_tile_bytes(seg.type, 16, l.n_chunk) + t0/cols*tile;
                        for (int64_t t = 0; t < n; t += cols, q += tile) {
                            xkv_expand_tile(seg.type, q, b.coef_v + t*rv + seg.first + r, rv);
                        }
                    }
                }
            }
        }
    }

    // K [d_k][n] at the tokens' positions, and V [n][d_v]
    void reconstruct(int64_t ic, int64_t t0, int64_t n, float * kt, float * vt) const {
        expand_coef(ic, t0, n);

        const float * a[XKV_MUL_ROWS];
        float *       c[XKV_MUL_ROWS];
        for (int64_t d = 0; d < l.dim[XKV_K]; d += XKV_MUL_ROWS) {
            const int m = (int) std::min<int64_t>(XKV_MUL_ROWS, l.dim[XKV_K] - d);
            for (int i = 0; i < m; ++i) {
                a[i] = b.base_k + (d + i)*rk;
                c[i] = kt + (d + i)*n;
            }
            if (l.plain) {
                memcpy(c[0], b.coef_k + d*n, m*n*sizeof(float));
            } else {
                xkv_mul<false>(m, l.rank[XKV_K], n, a, b.coef_k, n, c);
            }
        }
        for (int64_t t = 0; t < n; t += XKV_MUL_ROWS) {
            const int m = (int) std::min<int64_t>(XKV_MUL_ROWS, n - t);
            for (int i = 0; i < m; ++i) {
                a[i] = b.coef_v + (t + i)*rv;
                c[i] = vt + (t + i)*dv;
            }
            if (l.plain) {
                for (int i = 0; i < m; ++i) {
                    memcpy(c[i], a[i], l.dim[XKV_V]*sizeof(float));
                }
            } else {
                xkv_mul<false>(m, l.rank[XKV_V], dv, a, b.base_v, dv, c);
            }
        }
        const float * mean = l.mean_k(head);
        for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
            for (int64_t t = 0; t < n; t += 16) {
                xkv_store(kt + d*n + t, xkv_load(kt + d*n + t) + mean[d]);
            }
        }
        turn_back(ic, n, kt);
    }

    void turn_back(int64_t ic, int64_t n, float * kt) const {
        if (l.n_rot == 0) {
            return;
        }
        const float * cs   = l.pairs(ic, s);
        const int64_t half = l.n_rot/2;
        const bool    neox = l.par.flags & XKV_ATTN_ROPE_NEOX;
        for (int64_t i = 0; i < half; ++i) {
            const int64_t at0 = neox ? i        : 2*i;
            const int64_t at1 = neox ? i + half : 2*i + 1;
            const float   c   = cs[at0];
            const float   d   = -cs[at1];
            float * x = kt + (l.par.rot_first + at0)*n;
            float * y = kt + (l.par.rot_first + at1)*n;
            for (int64_t t = 0; t < n; t += 16) {
                const f32r xv = xkv_load(x + t);
                const f32r yv = xkv_load(y + t);
                xkv_store(x + t, xv*c - yv*d);
                xkv_store(y + t, xv*d + yv*c);
            }
        }
    }

    void load_exact(int64_t j0, int64_t n, int64_t n_pad, float * kt, float * vt) const {
        const auto get = [](const char * p, ggml_type type, int64_t n, float * dst) {
            if (type == GGML_TYPE_F32) {
                memcpy(dst, p, n*sizeof(float));
            } else {
                ggml_get_type_traits(type)->to_float(p, dst, n);
            }
        };
        float row[XKV_ATTN_MAX_HEAD] = {};
        for (int64_t t = 0; t < n_pad; ++t) {
            if (t < n) {
                get((const char *) l.k->data + head*l.k->nb[1] + (j0 + t)*l.k->nb[2] + s*l.k->nb[3], l.k->type, l.dim[XKV_K], row);
                get((const char *) l.v->data + head*l.v->nb[1] + (j0 + t)*l.v->nb[2] + s*l.v->nb[3], l.v->type, l.dim[XKV_V], vt + t*dv);
            } else {
                memset(row, 0, sizeof(row));
                memset(vt + t*dv, 0, dv*sizeof(float));
            }
            for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                kt[d*n_pad + t] = row[d];
            }
        }
    }

    void make(const xkv_tile_of & tile, int64_t i) const {
        if (tile.ic < 0) {
            load_exact(tile.first, tile.n, tile.n_pad, kt(i), vt(i));
        } else {
            reconstruct(tile.ic, tile.first, tile.n, kt(i), vt(i));
        }
    }

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
            any = any || bias[i] > -INFINITY;
            all = all && bias[i] == 0.0f;
        }
        add = all ? nullptr : bias;
        return any;
    }

    // queries [j0, j1) of the head, a unit
    void load_queries(int64_t j0, int64_t j1) const {
        for (int64_t j = j0; j < j1; ++j) {
            const float * q = l.query(query(j), s);
            for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                b.q[(j - j0)*dk + d] = q[d]*l.par.scale;
            }
        }
    }

    // they meet a tile
    void attend(const xkv_tile_of & tile, int64_t it, int64_t j0, int64_t j1) const {
        const int64_t n = tile.n_pad;

        float   bias[XKV_MUL_ROWS][XKV_TILE_TOKENS];
        int64_t bias_of = -1; // token of the batch that the last bias is of
        int     n_bias  = 0;
        bool    seen    = false;
        const float * add = nullptr;
        for (int64_t j = j0; j < j1; j += XKV_MUL_ROWS) {
            int m = 0;

            const float * adds [XKV_MUL_ROWS];
            float *       state[XKV_MUL_ROWS];
            float *       o    [XKV_MUL_ROWS];
            const float * a    [XKV_MUL_ROWS];
            float *       c    [XKV_MUL_ROWS];
            n_bias  = 0;
            bias_of = -1;
            for (int64_t k = j; k < std::min(j + XKV_MUL_ROWS, j1); ++k) {
                const int64_t t = k/l.n_gqa;
                if (t != bias_of) {
                    seen    = see(tile, t, bias[n_bias++], add);
                    bias_of = t;
                }
                if (!seen) {
                    continue;
                }
                adds [m] = add;
                state[m] = b.state + 2*query(k);
                o    [m] = l.out(query(k), s);
                a    [m] = b.q + (k - j0)*dk;
                c    [m] = b.s + m*XKV_TILE_TOKENS;
                m++;
            }
            if (m == 0) {
                continue;
            }
            xkv_mul<false>(m, l.dim[XKV_K], n, a, kt(it), n, c);
            for (int i = 0; i < m; ++i) {
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
                        xkv_store(o[i] + d, xkv_load(o[i] + d)*f);
                    }
                    state[i][0]  = max;
                    state[i][1] *= f;
                }
                f32r sum = {};
                for (int64_t t = 0; t < n; t += 16) {
                    const f32r p = max == -INFINITY ? f32r{} : xkv_exp(xkv_load(c[i] + t) - max);
                    xkv_store(c[i] + t, p);
                    sum += p;
                }
                state[i][1] += xkv_sum(sum);
            }
            xkv_mul<true>(m, n, dv, c, vt(it), dv, o);
        }
    }
};

// all tiles of a stream: stored tokens that a query sees, then exact ones
static std::vector<xkv_tile_of> xkv_list_tiles(const xkv_attn_layer & l, int64_t s) {
    std::vector<xkv_tile_of> res;
    for (int64_t ic = 0; ic < l.n_frame; ++ic) {
        int64_t most = 0;
        for (int64_t t = 0; t < l.n_tps; ++t) {
            most = std::max(most, l.n_fill(ic, t, s));
        }
        for (int64_t t0 = 0; t0 < most; t0 += XKV_TILE_TOKENS) {
            const int64_t n = std::min(XKV_TILE_TOKENS, l.n_chunk - t0);
            res.push_back({ ic, t0, n, n });
        }
    }
    for (int64_t j = 0; j < l.n_exact; j += XKV_TILE_TOKENS) {
        const int64_t n = std::min(XKV_TILE_TOKENS, l.n_exact - j);
        res.push_back({ -1, j, n, xkv_pad16(n) });
    }
    return res;
}

void xkv_attn_prefill(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user) {
    const xkv_prefill_buffers b = xkv_lay_out(l, work, ith, nth);

    const int64_t n_row  = l.n_gqa*l.n_tps;
    const int64_t n_unit = (n_row + XKV_UNIT_ROWS - 1)/XKV_UNIT_ROWS;
    for (int64_t s = 0; s < l.n_stream; ++s) {
        const auto tiles = xkv_list_tiles(l, s);

        int64_t u0, u1;
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        for (int64_t i = u0; i < u1; ++i) {
            memset(l.out(i, s), 0, l.dim[XKV_V]*sizeof(float));
            b.state[2*i]     = -INFINITY;
            b.state[2*i + 1] = 0.0f;
        }
        for (size_t first = 0; first < tiles.size(); first += XKV_BATCH_TILES) {
            const int64_t n_tile = std::min<int64_t>(XKV_BATCH_TILES, tiles.size() - first);

            xkv_share(l.n_head_kv*n_tile, ith, nth, &u0, &u1);
            int64_t expanded = -1;
            for (int64_t u = u0; u < u1; ++u) {
                const xkv_prefill p { l, b, s, u/n_tile };
                const auto & tile = tiles[first + u % n_tile];
                if (!l.plain && tile.ic >= 0 && expanded != p.head) {
                    p.expand_bases();
                    expanded = p.head;
                }
                p.make(tile, u % n_tile);
            }
            barrier(user);
            xkv_share(l.n_head_kv*n_unit, ith, nth, &u0, &u1);
            for (int64_t u = u0; u < u1; ++u) {
                const xkv_prefill p { l, b, s, u/n_unit };
                const int64_t j0 = u % n_unit*XKV_UNIT_ROWS;
                const int64_t j1 = std::min(j0 + XKV_UNIT_ROWS, n_row);
                p.load_queries(j0, j1);
                for (int64_t it = 0; it < n_tile; ++it) {
                    p.attend(tiles[first + it], it, j0, j1);
                }
            }
            barrier(user);
        }
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        for (int64_t i = u0; i < u1; ++i) {
            const float sum = b.state[2*i + 1];
            float *     o   = l.out(i, s);
            for (int64_t d = 0; d < l.dim[XKV_V]; ++d) {
                o[d] *= sum > 0.0f ? 1.0f/sum : 0.0f;
            }
        }
        barrier(user);
    }
}
