// A random instance of the op.

#pragma once

#include "../cpu/xkv-attn-layer.h"

#include <cmath>
#include <functional>
#include <random>
#include <vector>

// numbers that 8 bits hold as they are, so that rounding can hide no error
enum xkv_whole {
    XKV_WHOLE_NONE,
    XKV_WHOLE_QUERIES, // whole numbers, and a direction is a number of a head: scores lose nothing
    XKV_WHOLE_WEIGHTS, // queries are 0: all weights are the same
    XKV_WHOLE_SUMS,    // and so are sums of V, but for their signs; its bases are any
};

struct xkv_case {
    int64_t   n_stored = 256; // tokens there is room for
    int64_t   n_exact  = 48;
    int64_t   n_head = 6, n_head_kv = 2, dim_k = 64, dim_v = 64;
    int64_t   n_chunk = 64, n_tps = 1, n_stream = 1;
    int64_t   rank[2][XKV_ATTN_N_TYPE]  = {};
    ggml_type basis[2][XKV_ATTN_N_TYPE] = {};
    int64_t   lead[2]                   = { 0, 0 };
    ggml_type exact                     = GGML_TYPE_F16;
    ggml_type mask                      = GGML_TYPE_F16;
    float     tolerance                 = 0.0f;
    float     softcap                   = 0.0f;
    bool      sinks                     = false;
    int       flags                     = XKV_ATTN_ROPE_NEOX;
    int64_t   n_rot                     = -1; // of a head, -1: all
    int64_t   rot_first                 = 0;
    bool      full                      = false; // all chunks are full
    bool      causal                    = true;
    float     decay                     = 16.0f; // directions over which sizes halve
    xkv_whole whole                     = XKV_WHOLE_NONE;
    float     mislead = 0.0f; // size of K of every 16th token in a first segment, that a second one of the same rank takes back
};

static inline void xkv_encode_rows(ggml_type type, const float * x, void * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, x, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->from_float_ref(x, dst, n);
    }
}

// rows of numbers, packed
static inline void xkv_make_tiles(ggml_type type, uint8_t * tiles, int64_t n_row, int64_t n_col,
                                  const std::function<float(int64_t, int64_t)> & at) {
    const int64_t        cols  = xkv_tile_cols(type);
    const size_t         bytes = ggml_row_size(type, cols);
    std::vector<float>   x(16 * cols);
    std::vector<uint8_t> rows(16 * bytes);
    for (int64_t r = 0; r < n_row; r += 16) {
        for (int64_t c = 0; c < n_col; c += cols, tiles += 16 * bytes) {
            for (int i = 0; i < 16; ++i) {
                for (int j = 0; j < cols; ++j) {
                    x[i * cols + j] = at(r + i, c + j);
                }
                xkv_encode_rows(type, &x[i * cols], &rows[i * bytes], cols);
            }
            xkv_tile_pack(type, rows.data(), bytes, tiles);
        }
    }
}

// random numbers times size(row, column)
static inline void xkv_random_tiles(std::mt19937 & rng, ggml_type type, uint8_t * tiles, int64_t n_row, int64_t n_col,
                                    const std::function<float(int64_t, int64_t)> & size) {
    std::normal_distribution<float> nd;
    xkv_make_tiles(type, tiles, n_row, n_col, [&](int64_t r, int64_t c) { return nd(rng) * size(r, c); });
}

static inline ggml_tensor * xkv_make_case(ggml_context * ctx, const xkv_case & c, int seed) {
    std::mt19937                    rng(seed);
    std::normal_distribution<float> nd;

    xkv_attn_params par = {};
    par.scale           = 1.0f / sqrtf((float) c.dim_k);
    par.tolerance       = c.tolerance;
    par.softcap         = c.softcap;
    par.n_chunk         = (uint16_t) c.n_chunk;
    par.rot_first       = (uint16_t) c.rot_first;
    par.flags           = (uint8_t) c.flags;
    for (int kd = 0; kd < 2; ++kd) {
        par.lead[kd] = (uint16_t) c.lead[kd];
        for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
            par.rank[kd][i] = (uint16_t) c.rank[kd][i];
            par.type_basis[i] |= xkv_attn_type_index(c.basis[kd][i]) << 4 * kd;
        }
    }
    ggml_tensor * q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.dim_k, c.n_head, c.n_tps, c.n_stream);
    for (int64_t i = 0; i < ggml_nelements(q); ++i) {
        const float x          = nd(rng);
        const float whole      = i % 32 == 7 ? 127.0f : std::min(std::max(roundf(30.0f * x), -127.0f), 127.0f);
        ((float *) q->data)[i] = c.whole == XKV_WHOLE_NONE ? x : c.whole == XKV_WHOLE_QUERIES ? whole / 32.0f : 0.0f;
    }
    ggml_tensor * kv[2];
    for (int kd = 0; kd < 2; ++kd) {
        const int64_t dim = kd == XKV_K ? c.dim_k : c.dim_v;
        kv[kd]            = ggml_new_tensor_4d(ctx, c.exact, dim, c.n_head_kv, c.n_exact, c.n_stream);
        std::vector<float> x(ggml_nelements(kv[kd]));
        for (auto & y : x) {
            y = nd(rng);
        }
        xkv_encode_rows(c.exact, x.data(), kv[kd]->data, x.size());
    }
    ggml_tensor * mask = ggml_new_tensor_4d(ctx, c.mask, c.n_exact, c.n_tps, 1, c.n_stream);
    for (int64_t s = 0; s < c.n_stream; ++s) {
        for (int64_t t = 0; t < c.n_tps; ++t) {
            for (int64_t j = 0; j < c.n_exact; ++j) {
                const bool    see  = !c.causal || (j <= t + c.n_exact - c.n_tps && (j % 7 != 3 || j == 0));
                const float   bias = see ? 0.0f : -INFINITY;
                const int64_t at   = (s * c.n_tps + t) * c.n_exact + j;
                if (c.mask == GGML_TYPE_F32) {
                    ((float *) mask->data)[at] = bias;
                } else {
                    ((ggml_fp16_t *) mask->data)[at] = ggml_fp32_to_fp16(bias);
                }
            }
        }
    }
    ggml_tensor * sinks = c.sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head) : nullptr;
    for (int64_t i = 0; sinks && i < c.n_head; ++i) {
        ((float *) sinks->data)[i] = 2.0f * nd(rng) + 2.0f;
    }
    if (c.n_stored == 0) {
        return xkv_attn(ctx, { q, kv[0], kv[1], mask, nullptr, nullptr, nullptr, nullptr, nullptr, sinks }, &par);
    }

    ggml_tensor *        sizes = xkv_attn(ctx, { q, kv[0], kv[1], mask }, &par);
    const xkv_attn_layer l(sizes);
    const int64_t        n_frame = c.n_stored / c.n_chunk;
    const bool           plain   = c.flags & XKV_ATTN_PLAIN;
    const int64_t        n_part  = plain ? c.n_head_kv : 1;
    const int64_t        n_coef  = n_part * (l.head_coef[0] + l.head_coef[1]);
    const int64_t        n_basis = l.kind_basis[XKV_V] + c.n_head_kv * l.head_basis[XKV_V];

    ggml_tensor * coef  = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, n_coef, n_frame, c.n_stream);
    ggml_tensor * basis = ggml_new_tensor_2d(ctx, GGML_TYPE_I8, std::max<int64_t>(n_basis, 1), 1);
    ggml_tensor * mean  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_head_kv * c.dim_k);
    ggml_tensor * fill  = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, n_frame, c.n_tps, c.n_stream);
    ggml_tensor * turn  = nullptr;
    const auto    decay = [&](int64_t d) { return plain ? 1.0f : powf(0.5f, d / c.decay); };

    for (int64_t s = 0; s < c.n_stream; ++s) {
        for (int64_t f = 0; f < n_frame; ++f) {
            uint8_t *  p     = (uint8_t *) coef->data + f * coef->nb[1] + s * coef->nb[2];
            const auto again = rng;
            for (int kd = 0; kd < 2; ++kd) {
                for (int64_t part = 0; part < n_part; ++part) {
                    for (int is = 0; is < l.n_segment[kd]; ++is) {
                        const auto & seg = l.segments[kd][is];
                        const auto   at  = p + seg.coef + part * l.head_coef[kd];
                        if (kd == XKV_K) {
                            rng = c.mislead > 0.0f ? again : rng;
                            xkv_random_tiles(rng, seg.type, at, c.n_chunk, seg.rank, [&](int64_t t, int64_t d) {
                                return c.mislead > 0.0f && t % 16 == 5 ? (is == 0 ? c.mislead : -c.mislead) : decay(seg.first + d);
                            });
                        } else if (c.whole == XKV_WHOLE_SUMS) {
                            xkv_make_tiles(seg.type, at, seg.rank, c.n_chunk,
                                           [&](int64_t d, int64_t) { return (seg.first + d) * 7 % 5 < 2 ? -127.0f : 127.0f; });
                        } else {
                            xkv_random_tiles(rng, seg.type, at, seg.rank, c.n_chunk,
                                             [&](int64_t d, int64_t) { return decay(seg.first + d); });
                        }
                    }
                }
            }
            const int64_t n = c.full ? c.n_chunk : (f % 5 == 3 ? 0 : f % 3 == 1 ? 1 + rng() % c.n_chunk : c.n_chunk);
            for (int64_t t = 0; t < c.n_tps; ++t) {
                ((int32_t *) fill->data)[(s * c.n_tps + t) * n_frame + f] = (int32_t) (c.full || t % 4 != 2 ? n : 0);
            }
        }
    }
    for (int64_t i = 0; i < ggml_nelements(mean); ++i) {
        ((float *) mean->data)[i] = 0.3f * nd(rng);
    }
    const auto size = [](int64_t, int64_t) { return 0.25f; };
    for (int kd = 0; kd < 2 && !plain; ++kd) {
        for (int64_t h = 0; h < c.n_head_kv; ++h) {
            const auto again = rng;
            for (int is = 0; is < l.n_segment[kd]; ++is) {
                const auto & seg = l.segments[kd][is];
                uint8_t *    at  = (uint8_t *) basis->data + l.kind_basis[kd] + h * l.head_basis[kd] + seg.basis;
                if (c.whole != XKV_WHOLE_NONE && (kd == XKV_K || c.whole != XKV_WHOLE_SUMS)) {
                    const bool k = kd == XKV_K;
                    xkv_make_tiles(seg.type_basis, at, k ? seg.rank : c.dim_v, k ? c.dim_k : seg.rank, [&](int64_t row, int64_t col) {
                        return (k ? (seg.first + row) % c.dim_k == col : (seg.first + col) % c.dim_v == row) ? 1.0f : 0.0f;
                    });
                } else if (kd == XKV_K) {
                    rng = c.mislead > 0.0f ? again : rng;
                    xkv_random_tiles(rng, seg.type_basis, at, seg.rank, c.dim_k, size);
                } else {
                    xkv_random_tiles(rng, seg.type_basis, at, c.dim_v, seg.rank, size);
                }
            }
        }
    }
    const int64_t n_rot = c.n_rot < 0 ? c.dim_k : c.n_rot;
    if (n_rot > 0) {
        turn = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_rot, 1, n_frame * c.n_stream);
        for (int64_t f = 0; f < n_frame * c.n_stream; ++f) {
            for (int64_t i = 0; i < n_rot / 2; ++i) {
                const double a                                         = -(double) (f * c.n_chunk + 5) * pow(10000.0, -2.0 * i / n_rot);
                const bool   neox                                      = c.flags & XKV_ATTN_ROPE_NEOX;
                ((float *) turn->data)[f * n_rot + (neox ? i : 2 * i)] = (float) cos(a);
                ((float *) turn->data)[f * n_rot + (neox ? i + n_rot / 2 : 2 * i + 1)] = (float) sin(a);
            }
        }
    }
    return xkv_attn(ctx, { q, kv[0], kv[1], mask, coef, plain ? nullptr : basis, turn, fill, mean, sinks }, &par);
}
