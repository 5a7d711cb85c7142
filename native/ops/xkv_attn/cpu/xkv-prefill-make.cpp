// Prefill: K and V of tokens as f32, from coefficients and bases, or as they are.

#include "xkv-prefill.h"

struct xkv_prefill_maker : xkv_prefill_head {
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
                            xkv_expand_tile(seg.type_basis, p, b.base_k + c * rk + seg.first + r, rk);
                        }
                    }
                } else {
                    for (int64_t c = 0; c < l.dim[XKV_V]; c += 16) {
                        for (int64_t r = 0; r < seg.rank; r += cols, p += tile) {
                            xkv_expand_tile(seg.type_basis, p, b.base_v + (seg.first + r) * dv + c, dv);
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
                const uint8_t * p    = l.chunk(ic, s) + seg.coef + (l.plain ? head * l.head_coef[kd] : 0);
                if (kd == XKV_K) {
                    for (int64_t t = 0; t < n; t += 16) {
                        const uint8_t * q = p + (t0 + t) / 16 * xkv_tile_bytes(seg.type, 16, seg.rank);
                        for (int64_t r = 0; r < seg.rank; r += cols, q += tile) {
                            xkv_expand_tile(seg.type, q, b.coef_k + (seg.first + r) * n + t, n);
                        }
                    }
                } else {
                    for (int64_t r = 0; r < seg.rank; r += 16) {
                        // a tile of 128 tokens begins before t0 where that is its second half
                        const uint8_t * q = p + r / 16 * xkv_tile_bytes(seg.type, 16, l.n_chunk) + t0 / cols * tile;
                        for (int64_t t = -(t0 % cols); t < n; t += cols, q += tile) {
                            xkv_expand_tile(seg.type, q, b.coef_v + t * rv + seg.first + r, rv);
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
                a[i] = b.base_k + (d + i) * rk;
                c[i] = kt + (d + i) * n;
            }
            if (l.plain) {
                memcpy(c[0], b.coef_k + d * n, m * n * sizeof(float));
            } else {
                xkv_mul<false>(m, l.rank[XKV_K], n, a, b.coef_k, n, c);
            }
        }
        for (int64_t t = 0; t < n; t += XKV_MUL_ROWS) {
            const int m = (int) std::min<int64_t>(XKV_MUL_ROWS, n - t);
            for (int i = 0; i < m; ++i) {
                a[i] = b.coef_v + (t + i) * rv;
                c[i] = vt + (t + i) * dv;
            }
            if (l.plain) {
                for (int i = 0; i < m; ++i) {
                    memcpy(c[i], a[i], l.dim[XKV_V] * sizeof(float));
                }
            } else {
                xkv_mul<false>(m, l.rank[XKV_V], dv, a, b.base_v, dv, c);
            }
        }
        const float * mean = l.mean_k(head);
        for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
            for (int64_t t = 0; t < n; t += 16) {
                xkv_store(kt + d * n + t, xkv_load(kt + d * n + t) + mean[d]);
            }
        }
        turn_back(ic, n, kt);
    }

    void turn_back(int64_t ic, int64_t n, float * kt) const {
        if (l.n_rot == 0) {
            return;
        }
        const float * cs   = l.pairs(ic, s);
        const int64_t half = l.n_rot / 2;
        const bool    neox = l.par.flags & XKV_ATTN_ROPE_NEOX;
        for (int64_t i = 0; i < half; ++i) {
            const int64_t at0 = neox ? i : 2 * i;
            const int64_t at1 = neox ? i + half : 2 * i + 1;
            const float   c   = cs[at0];
            const float   d   = -cs[at1];
            float *       x   = kt + (l.par.rot_first + at0) * n;
            float *       y   = kt + (l.par.rot_first + at1) * n;
            for (int64_t t = 0; t < n; t += 16) {
                const f32r xv = xkv_load(x + t);
                const f32r yv = xkv_load(y + t);
                xkv_store(x + t, xv * c - yv * d);
                xkv_store(y + t, xv * d + yv * c);
            }
        }
    }

    void load_exact(int64_t j0, int64_t n, int64_t n_pad, float * kt, float * vt) const {
        const auto get = [](const char * p, ggml_type type, int64_t n, float * dst) {
            if (type == GGML_TYPE_F32) {
                memcpy(dst, p, n * sizeof(float));
            } else {
                ggml_get_type_traits(type)->to_float(p, dst, n);
            }
        };
        float row[XKV_ATTN_MAX_HEAD] = {};
        for (int64_t t = 0; t < n_pad; ++t) {
            if (t < n) {
                get((const char *) l.k->data + head * l.k->nb[1] + (j0 + t) * l.k->nb[2] + s * l.k->nb[3], l.k->type, l.dim[XKV_K], row);
                get((const char *) l.v->data + head * l.v->nb[1] + (j0 + t) * l.v->nb[2] + s * l.v->nb[3], l.v->type, l.dim[XKV_V],
                    vt + t * dv);
            } else {
                memset(row, 0, sizeof(row));
                memset(vt + t * dv, 0, dv * sizeof(float));
            }
            for (int64_t d = 0; d < l.dim[XKV_K]; ++d) {
                kt[d * n_pad + t] = row[d];
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
};

void xkv_prefill_expand_bases(const xkv_prefill_head & h) {
    xkv_prefill_maker{ h }.expand_bases();
}

void xkv_prefill_make(const xkv_prefill_head & h, const xkv_tile_of & tile, int64_t i) {
    xkv_prefill_maker{ h }.make(tile, i);
}
