// Many queries: K and V of a tile of tokens are reconstructed for one KV head, in f32, meet all its queries and are forgotten; each
// query keeps a running max and sum. Work is dealt by KV head and span of chunks; spans are a fixed number, and their sums are merged.

#include "xkv-attn-layer.h"

// tokens of a tile
static const int64_t XKV_TILE_TOKENS = 64;

// spans of stored tokens
static const int64_t XKV_N_SPAN = 4;

// queries of a unit of exact attention
static const int64_t XKV_EXACT_QUERIES = 256;

static const int64_t XKV_PAD = 16;

struct xkv_prefill_buffers {
    float * sums; // [n_span + 1][n_query][d_v + pad]: sums, max, sum of weights
    int64_t stride;

    // of a thread
    float * base_k; // [d_k][rank]
    float * base_v; // [rank][d_v]
    float * coef_k; // [rank][tile]
    float * coef_v; // [tile][rank]
    float * kt;     // [d_k][tile]
    float * vt;     // [tile][d_v]
    float * s;      // [rows][tile]
    float * q;      // [rows][d_k]

    size_t bytes;

    float * at(int64_t n_query, int64_t span, int64_t i) const { return sums + (span*n_query + i)*stride; }
};

static int64_t xkv_pad16(int64_t n) {
    return (n + 15)/16*16;
}

static xkv_prefill_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_prefill_buffers b;

    const int64_t dk = xkv_pad16(l.dim[XKV_K]);
    const int64_t dv = xkv_pad16(l.dim[XKV_V]);
    const int64_t rk = xkv_pad16(l.rank[XKV_K]);
    const int64_t rv = xkv_pad16(l.rank[XKV_V]);

    xkv_arena shared = { work };
    b.stride = dv + XKV_PAD;
    b.sums   = shared.take<float>((XKV_N_SPAN + 1)*l.n_query*b.stride);

    const auto own = [&](xkv_arena a) {
        b.base_k = a.take<float>(dk*rk);
        b.base_v = a.take<float>(rv*dv);
        // a tile of coefficients has up to 128 columns
        b.coef_k = a.take<float>((rk + 128)*XKV_TILE_TOKENS);
        b.coef_v = a.take<float>(rv*(XKV_TILE_TOKENS + 128));
        b.kt     = a.take<float>(dk*XKV_TILE_TOKENS);
        b.vt     = a.take<float>(dv*XKV_TILE_TOKENS);
        b.s      = a.take<float>(XKV_MUL_ROWS*XKV_TILE_TOKENS);
        b.q      = a.take<float>(XKV_MUL_ROWS*dk);
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

    void clear(int64_t span, int64_t j0, int64_t j1) const {
        for (int64_t j = j0; j < j1; ++j) {
            float * o = b.at(l.n_query, span, query(j));
            memset(o, 0, dv*sizeof(float));
            o[dv]     = -INFINITY;
            o[dv + 1] = 0.0f;
        }
    }

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
    void reconstruct(int64_t ic, int64_t t0, int64_t n) const {
        expand_coef(ic, t0, n);

        const float * a[XKV_MUL_ROWS];
        float *       c[XKV_MUL_ROWS];
        for (int64_t d = 0; d < l.dim[XKV_K]; d += XKV_MUL_ROWS) {
            const int m = (int) std::min<int64_t>(XKV_MUL_ROWS, l.dim[XKV_K] - d);
            for (int i = 0; i < m; ++i) {
                a[i] = b.base_k + (d + i)*rk;
                c[i] = b.kt + (d + i)*n;
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
                c[i] = b.vt + (t + i)*dv;
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
                xkv_store(b.kt + d*n + t, xkv_load(b.kt + d*n + t) + mean[d]);
            }
        }
        turn_back(ic, n);
    }

    void turn_back(int64_t ic, int64_t n) const {
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
            float * x = b.kt + (l.par.rot_first + at0)*n;
            float * y = b.kt + (l.par.rot_first + at1)*n;
            for (int64_t t = 0; t < n; t += 16) {
                const f32r xv = xkv_load(x + t);
                const f32r yv = xkv_load(y + t);
                xkv_store(x + t, xv*c - yv*d);
                xkv_store(y + t, xv*d + yv*c);
            }
        }
    }

    // queries [j0, j1) of the head meet a tile of n tokens; see(t, bias) is false when token t of the batch sees none of them, or
    // fills in what is added to the scores
    template <typename F> void attend(int64_t span, int64_t j0, int64_t j1, int64_t n, F && see) const {
        for (int64_t j = j0; j < j1; j += XKV_MUL_ROWS) {
            int m = 0;

            const float * bias[XKV_MUL_ROWS];
            float *       o   [XKV_MUL_ROWS];
            const float * a   [XKV_MUL_ROWS];
            float *       c   [XKV_MUL_ROWS];
            for (int64_t k = j; k < std::min(j + XKV_MUL_ROWS, j1); ++k) {
                const float * add = nullptr;
                if (!see(k/l.n_gqa, add)) {
                    continue;
                }
                const float * q = l.query(query(k), s);
                float *      qs = b.q + m*dk;
                for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                    qs[d] = q[d]*l.par.scale;
                }
                bias[m] = add;
                o   [m] = b.at(l.n_query, span, query(k));
                a   [m] = qs;
                c   [m] = b.s + m*XKV_TILE_TOKENS;
                m++;
            }
            if (m == 0) {
                continue;
            }
            xkv_mul<false>(m, l.dim[XKV_K], n, a, b.kt, n, c);
            for (int i = 0; i < m; ++i) {
                f32r top = xkv_set1(-INFINITY);
                for (int64_t t = 0; t < n; t += 16) {
                    f32r x = xkv_load(c[i] + t);
                    if (bias[i]) {
                        x += xkv_load(bias[i] + t);
                        xkv_store(c[i] + t, x);
                    }
                    top = xkv_max(top, x);
                }
                const float old = o[i][dv];
                const float max = std::max(old, xkv_max(top));
                if (max > old) {
                    const float f = old == -INFINITY ? 0.0f : expf(old - max);
                    for (int64_t d = 0; d < dv; d += 16) {
                        xkv_store(o[i] + d, xkv_load(o[i] + d)*f);
                    }
                    o[i][dv + 1] *= f;
                    o[i][dv]      = max;
                }
                f32r sum = {};
                for (int64_t t = 0; t < n; t += 16) {
                    const f32r p = max == -INFINITY ? f32r{} : xkv_exp(xkv_load(c[i] + t) - max);
                    xkv_store(c[i] + t, p);
                    sum += p;
                }
                o[i][dv + 1] += xkv_sum(sum);
            }
            xkv_mul<true>(m, n, dv, c, b.vt, dv, o);
        }
    }

    void run_stored(int64_t span, int64_t ic0, int64_t ic1) const {
        const int64_t n_row = l.n_gqa*l.n_tps;
        clear(span, 0, n_row);
        if (!l.plain) {
            expand_bases();
        }
        float tail[XKV_TILE_TOKENS];
        for (int64_t ic = ic0; ic < ic1; ++ic) {
            int64_t most = 0;
            for (int64_t t = 0; t < l.n_tps; ++t) {
                most = std::max(most, l.n_fill(ic, t, s));
            }
            for (int64_t t0 = 0; t0 < most; t0 += XKV_TILE_TOKENS) {
                const int64_t n = std::min(XKV_TILE_TOKENS, l.n_chunk - t0);
                reconstruct(ic, t0, n);
                int64_t tail_of = -1;
                attend(span, 0, n_row, n, [&](int64_t t, const float *& bias) {
                    const int64_t fill = l.n_fill(ic, t, s) - t0;
                    if (fill < n && fill > 0) {
                        if (tail_of != fill) {
                            for (int64_t i = 0; i < n; ++i) {
                                tail[i] = i < fill ? 0.0f : -INFINITY;
                            }
                            tail_of = fill;
                        }
                        bias = tail;
                    }
                    return fill > 0;
                });
            }
        }
    }

    void load_exact(int64_t j0, int64_t n, int64_t n_pad) const {
        const auto get = [](const char * p, ggml_type type, int64_t n, float * dst) {
            if (type == GGML_TYPE_F32) {
                memcpy(dst, p, n*sizeof(float));
            } else {
                ggml_get_type_traits(type)->to_float(p, dst, n);
            }
        };
        float row[512];
        for (int64_t t = 0; t < n_pad; ++t) {
            if (t < n) {
                get((const char *) l.k->data + head*l.k->nb[1] + (j0 + t)*l.k->nb[2] + s*l.k->nb[3], l.k->type, l.dim[XKV_K], row);
                get((const char *) l.v->data + head*l.v->nb[1] + (j0 + t)*l.v->nb[2] + s*l.v->nb[3], l.v->type, l.dim[XKV_V], b.vt + t*dv);
            } else {
                memset(row, 0, sizeof(row));
                memset(b.vt + t*dv, 0, dv*sizeof(float));
            }
            for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                b.kt[d*n_pad + t] = row[d];
            }
        }
    }

    // tokens of the batch [t0, t1) over the exact tokens
    void run_exact(int64_t span, int64_t t0, int64_t t1) const {
        clear(span, t0*l.n_gqa, t1*l.n_gqa);

        float bias[XKV_TILE_TOKENS];
        for (int64_t j = 0; j < l.n_exact; j += XKV_TILE_TOKENS) {
            const int64_t n     = std::min(XKV_TILE_TOKENS, l.n_exact - j);
            const int64_t n_pad = xkv_pad16(n);
            bool loaded = false;
            for (int64_t t = t0; t < t1; ++t) {
                bool any = false;
                for (int64_t i = 0; i < n_pad; ++i) {
                    bias[i] = i < n ? l.mask_at(j + i, t, s) : -INFINITY;
                    any = any || bias[i] > -INFINITY;
                }
                if (!any) {
                    continue;
                }
                if (!loaded) {
                    load_exact(j, n, n_pad);
                    loaded = true;
                }
                attend(span, t*l.n_gqa, (t + 1)*l.n_gqa, n_pad, [&](int64_t, const float *& add) {
                    add = bias;
                    return true;
                });
            }
        }
    }
};

void xkv_attn_prefill(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user) {
    const xkv_prefill_buffers b = xkv_lay_out(l, work, ith, nth);

    const int64_t n_span  = std::min(XKV_N_SPAN, l.n_frame);
    const int64_t n_block = (l.n_tps*l.n_gqa + XKV_EXACT_QUERIES - 1)/XKV_EXACT_QUERIES;
    for (int64_t s = 0; s < l.n_stream; ++s) {
        int64_t u0, u1;
        xkv_share(l.n_head_kv*n_span, ith, nth, &u0, &u1);
        for (int64_t u = u0; u < u1; ++u) {
            const int64_t span = u % n_span;
            xkv_prefill { l, b, s, u/n_span }.run_stored(span, l.n_frame*span/n_span, l.n_frame*(span + 1)/n_span);
        }
        xkv_share(l.n_head_kv*n_block, ith, nth, &u0, &u1);
        for (int64_t u = u0; u < u1; ++u) {
            const int64_t k = u % n_block;
            xkv_prefill { l, b, s, u/n_block }.run_exact(n_span, l.n_tps*k/n_block, l.n_tps*(k + 1)/n_block);
        }
        barrier(user);
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        const int64_t dv = xkv_pad16(l.dim[XKV_V]);
        for (int64_t i = u0; i < u1; ++i) {
            float max = -INFINITY;
            for (int64_t k = 0; k <= n_span; ++k) {
                max = std::max(max, b.at(l.n_query, k, i)[dv]);
            }
            float * o   = l.out(i, s);
            float   sum = 0.0f;
            memset(o, 0, l.dim[XKV_V]*sizeof(float));
            for (int64_t k = 0; k <= n_span; ++k) {
                const float * x = b.at(l.n_query, k, i);
                if (x[dv + 1] > 0.0f) {
                    const float f = expf(x[dv] - max);
                    sum += f*x[dv + 1];
                    for (int64_t d = 0; d < l.dim[XKV_V]; ++d) {
                        o[d] += f*x[d];
                    }
                }
            }
            for (int64_t d = 0; d < l.dim[XKV_V]; ++d) {
                o[d] *= sum > 0.0f ? 1.0f/sum : 0.0f;
            }
        }
        barrier(user);
    }
}
