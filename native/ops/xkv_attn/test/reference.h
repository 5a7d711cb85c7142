// XKV_ATTN in plain f64 loops, from the op's description alone: K and V of every token are rebuilt, then attention.

#pragma once

#include "../cpu/xkv-attn-layer.h"

#include <cmath>
#include <vector>

// n_row rows of n_col columns as f32 [n_row][n_col]
static inline std::vector<float> xkv_ref_rows(ggml_type type, const uint8_t * tiles, int64_t n_row, int64_t n_col) {
    const int64_t cols = xkv_tile_cols(type);
    const size_t  size = ggml_row_size(type, cols);

    std::vector<float>   res(n_row * n_col);
    std::vector<uint8_t> rows(16 * size);
    for (int64_t r = 0; r < n_row; r += 16) {
        for (int64_t c = 0; c < n_col; c += cols, tiles += 16 * size) {
            xkv_tile_unpack(type, tiles, rows.data(), size);
            for (int i = 0; i < 16; ++i) {
                if (type == GGML_TYPE_F32) {
                    memcpy(&res[(r + i) * n_col + c], &rows[i * size], cols * sizeof(float));
                } else {
                    ggml_get_type_traits(type)->to_float(&rows[i * size], &res[(r + i) * n_col + c], cols);
                }
            }
        }
    }
    return res;
}

static inline std::vector<float> xkv_ref_row(const ggml_tensor * t, int64_t j, int64_t head, int64_t s) {
    const char *       p = (const char *) t->data + head * t->nb[1] + j * t->nb[2] + s * t->nb[3];
    std::vector<float> res(t->ne[0]);
    if (t->type == GGML_TYPE_F32) {
        memcpy(res.data(), p, res.size() * sizeof(float));
    } else {
        ggml_get_type_traits(t->type)->to_float(p, res.data(), res.size());
    }
    return res;
}

// [d_v, n_head, n_tps, n_stream]
static inline std::vector<double> xkv_ref_attn(const ggml_tensor * t) {
    const xkv_attn_layer l(t);

    const int64_t       dk = l.dim[XKV_K];
    const int64_t       dv = l.dim[XKV_V];
    std::vector<double> res(dv * l.n_head * l.n_tps * l.n_stream);
    for (int64_t s = 0; s < l.n_stream; ++s) {
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            std::vector<std::vector<float>> keys, values;
            std::vector<int64_t>            frames; // of stored tokens
            std::vector<int64_t>            slots;
            std::vector<float>              basis[2]; // [rank][dim], [dim][rank] for V
            for (int64_t ic = 0; ic < l.n_frame; ++ic) {
                std::vector<double> x[2]; // [token][dim]
                for (int kd = 0; kd < 2; ++kd) {
                    const int64_t dim = l.dim[kd];
                    x[kd].assign(l.n_chunk * dim, 0.0);
                    for (int is = 0; is < l.n_segment[kd]; ++is) {
                        const auto &    seg = l.segments[kd][is];
                        const uint8_t * p   = l.chunk(ic, s) + seg.coef + (l.plain ? h * l.head_coef[kd] : 0);
                        const auto      coef =
                            kd == XKV_K ? xkv_ref_rows(seg.type, p, l.n_chunk, seg.rank) : xkv_ref_rows(seg.type, p, seg.rank, l.n_chunk);
                        const auto at = [&](int64_t tok, int64_t r) {
                            return kd == XKV_K ? coef[tok * seg.rank + r] : coef[r * l.n_chunk + tok];
                        };
                        if (l.plain) {
                            for (int64_t tok = 0; tok < l.n_chunk; ++tok) {
                                for (int64_t d = 0; d < seg.rank; ++d) {
                                    x[kd][tok * dim + seg.first + d] += at(tok, d);
                                }
                            }
                            continue;
                        }
                        const uint8_t * b = l.bases(kd, h) + seg.basis;
                        const auto      base =
                            kd == XKV_K ? xkv_ref_rows(seg.type_basis, b, seg.rank, dim) : xkv_ref_rows(seg.type_basis, b, dim, seg.rank);
                        for (int64_t tok = 0; tok < l.n_chunk; ++tok) {
                            for (int64_t r = 0; r < seg.rank; ++r) {
                                for (int64_t d = 0; d < dim; ++d) {
                                    x[kd][tok * dim + d] +=
                                        (double) at(tok, r) * (kd == XKV_K ? base[r * dim + d] : base[d * seg.rank + r]);
                                }
                            }
                        }
                    }
                }
                for (int64_t tok = 0; tok < l.n_chunk; ++tok) {
                    std::vector<float> k(dk), kr(dk), v(dv);
                    for (int64_t d = 0; d < dk; ++d) {
                        k[d] = (float) x[XKV_K][tok * dk + d] + l.mean_k(h)[d];
                    }
                    kr = k;
                    for (int64_t d = 0; d < l.n_rot / 2; ++d) {
                        const bool    neox      = l.par.flags & XKV_ATTN_ROPE_NEOX;
                        const int64_t a         = neox ? d : 2 * d;
                        const int64_t b         = neox ? d + l.n_rot / 2 : 2 * d + 1;
                        const double  c         = l.pairs(ic, s)[a];
                        const double  e         = -l.pairs(ic, s)[b];
                        kr[l.par.rot_first + a] = (float) (k[l.par.rot_first + a] * c - k[l.par.rot_first + b] * e);
                        kr[l.par.rot_first + b] = (float) (k[l.par.rot_first + a] * e + k[l.par.rot_first + b] * c);
                    }
                    for (int64_t d = 0; d < dv; ++d) {
                        v[d] = (float) x[XKV_V][tok * dv + d];
                    }
                    keys.push_back(kr);
                    values.push_back(v);
                    frames.push_back(ic);
                    slots.push_back(tok);
                }
            }
            for (int64_t i = 0; i < l.n_query; ++i) {
                if (l.head_kv(i) != h) {
                    continue;
                }
                const int64_t                           tq = i / l.n_head;
                std::vector<double>                     score, weight;
                std::vector<const std::vector<float> *> vs;
                const auto                              add = [&](const std::vector<float> & k, const std::vector<float> & v, double bias) {
                    double x = 0.0;
                    for (int64_t d = 0; d < dk; ++d) {
                        x += (double) k[d] * l.query(i, s)[d];
                    }
                    x *= l.par.scale;
                    x = l.par.softcap != 0.0f ? l.par.softcap * tanh(x / l.par.softcap) : x;
                    score.push_back(x + bias);
                    vs.push_back(&v);
                };
                for (size_t j = 0; j < keys.size(); ++j) {
                    if (slots[j] < l.n_fill(frames[j], tq, s)) {
                        add(keys[j], values[j], 0.0);
                    }
                }
                std::vector<std::vector<float>> exact(2 * l.n_exact);
                for (int64_t j = 0; j < l.n_exact; ++j) {
                    const float bias = l.mask_at(j, tq, s);
                    if (bias > -INFINITY) {
                        exact[2 * j]     = xkv_ref_row(l.k, j, h, s);
                        exact[2 * j + 1] = xkv_ref_row(l.v, j, h, s);
                        add(exact[2 * j], exact[2 * j + 1], bias);
                    }
                }
                double max = l.sink(i);
                for (double x : score) {
                    max = std::max(max, x);
                }
                double   sum = l.sinks ? exp(l.sink(i) - max) : 0.0;
                double * o   = res.data() + (s * l.n_query + i) * dv;
                for (size_t j = 0; j < score.size(); ++j) {
                    const double p = exp(score[j] - max);
                    sum += p;
                    for (int64_t d = 0; d < dv; ++d) {
                        o[d] += p * (*vs[j])[d];
                    }
                }
                for (int64_t d = 0; d < dv; ++d) {
                    o[d] = sum > 0.0 ? o[d] / sum : 0.0;
                }
            }
        }
    }
    return res;
}
