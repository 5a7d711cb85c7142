// Few queries: they go to each chunk's frame and through the lead of the basis of K, and meet the coefficients as integers. Exact
// tokens come first: with them, a lower bound of each query's softmax is known, so that one pass over the chunks decides which
// blocks are refined. Chunks are dealt in a fixed number of spans, whatever the number of threads, and the spans' sums are merged.

#include "xkv-attn-layer.h"

// spans of chunks and of exact tokens that are summed apart
static const int64_t XKV_N_SPAN  = 16;
static const int64_t XKV_N_EXACT = 4;

static const int64_t XKV_PAD = 16;

// exact tokens that are looked at together
static const int64_t XKV_EXACT_BLOCK = 16;

// sums of a query over a span: numbers weighted by exp(score - max), then max and sum of weights
struct xkv_partials {
    float * data;
    int64_t n_query, n;

    float * sums(int64_t span, int64_t i) const { return data + (span*n_query + i)*(n + XKV_PAD); }
    float & max (int64_t span, int64_t i) const { return sums(span, i)[n]; }
    float & sum (int64_t span, int64_t i) const { return sums(span, i)[n + 1]; }
};

struct xkv_decode_buffers {
    xkv_partials exact;
    xkv_partials spans;

    // of a thread
    float *   qf;
    int8_t *  qc;
    float *   qs;
    int32_t * qn;
    float *   y; // queries through the basis of K
    int8_t *  yc;
    float *   ys;
    int32_t * yn;
    float *   score; // [n_query][n_chunk]
    float *   weight;
    float *   sum;   // [n_query] of the chunk's weights
    float *   mean;  // [n_query]
    int8_t *  pc;
    float *   ps;
    int32_t * pn;
    uint8_t * fine;  // [n_query][n_chunk/XKV_ATTN_FINE]
    float *   base;  // [n_query] sum of the exact tokens at the current max
    float *   row_k; // [XKV_EXACT_BLOCK][d_k]
    float *   row_v;

    size_t bytes;
};

static xkv_decode_buffers xkv_lay_out(const xkv_attn_layer & l, char * work, int ith, int nth) {
    xkv_decode_buffers b;
    xkv_arena shared = { work };

    b.exact = { nullptr, l.n_query, l.dim[XKV_V] };
    b.spans = { nullptr, l.n_query, std::max(l.rank[XKV_V], l.dim[XKV_V]) };
    b.exact.data = shared.take<float>(XKV_N_EXACT*l.n_query*(b.exact.n + XKV_PAD));
    b.spans.data = shared.take<float>(XKV_N_SPAN *l.n_query*(b.spans.n + XKV_PAD));

    const auto own = [&](xkv_arena a) {
        const int64_t n = l.n_query;
        const int64_t d = std::max(l.dim[XKV_K], l.dim[XKV_V]) + 32;
        const int64_t r = std::max(l.rank[XKV_K], l.rank[XKV_V]) + 32;
        b.qf = a.take<float>(n*d);
        b.qc = a.take<int8_t>(n*d);
        b.qs = a.take<float>(n*d/32 + n);
        b.qn = a.take<int32_t>(n*d/32 + n);
        b.y  = a.take<float>(n*r);
        b.yc = a.take<int8_t>(n*r);
        b.ys = a.take<float>(n*r/32 + n);
        b.yn = a.take<int32_t>(n*r/32 + n);
        b.score  = a.take<float>(n*l.n_chunk);
        b.weight = a.take<float>(n*l.n_chunk);
        b.sum    = a.take<float>(n);
        b.mean  = a.take<float>(n);
        b.pc    = a.take<int8_t>(n*l.n_chunk);
        b.ps    = a.take<float>(n*(l.n_chunk/32 + 1));
        b.pn    = a.take<int32_t>(n*(l.n_chunk/32 + 1));
        b.fine  = a.take<uint8_t>(n*(l.n_chunk/XKV_ATTN_FINE + 1));
        b.base  = a.take<float>(n);
        b.row_k = a.take<float>(XKV_EXACT_BLOCK*l.dim[XKV_K]);
        b.row_v = a.take<float>(XKV_EXACT_BLOCK*l.dim[XKV_V]);
        return a.at;
    };
    const size_t size = own({ nullptr }) - (char *) nullptr;
    b.bytes = (shared.at - work) + nth*size;
    own({ shared.at + ith*size });
    return b;
}

size_t xkv_attn_decode_bytes(const xkv_attn_layer & l, int nth) {
    return xkv_lay_out(l, nullptr, 0, nth).bytes + 64;
}

//
// exact tokens
//

static void xkv_row_f32(const ggml_tensor * t, int64_t j, int64_t head, int64_t s, float * dst) {
    const char *  p = (const char *) t->data + head*t->nb[1] + j*t->nb[2] + s*t->nb[3];
    const int64_t n = t->ne[0];
    switch (t->type) {
        case GGML_TYPE_F32:
            memcpy(dst, p, n*sizeof(float));
            break;
        case GGML_TYPE_F16: {
            int64_t i = 0;
            for (; i + 16 <= n; i += 16) {
                xkv_store(dst + i, xkv_load_f16(p + 2*i));
            }
            for (; i < n; ++i) {
                dst[i] = xkv_f16(p + 2*i);
            }
            break;
        }
        default: // Q8_0
            for (int64_t c = 0; c < n/32; ++c, p += 34) {
                const float d = xkv_f16(p);
                xkv_store(dst + 32*c,      xkv_load_i8(p + 2)*d);
                xkv_store(dst + 32*c + 16, xkv_load_i8(p + 18)*d);
            }
            break;
    }
}

static float xkv_dot_f32(int64_t n, const float * x, const float * y) {
    f32r acc = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        acc += xkv_load(x + i)*xkv_load(y + i);
    }
    float res = xkv_sum(acc);
    for (; i < n; ++i) {
        res += x[i]*y[i];
    }
    return res;
}

static void xkv_add_f32(int64_t n, float a, const float * x, float * y) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        xkv_store(y + i, xkv_load(y + i) + xkv_load(x + i)*a);
    }
    for (; i < n; ++i) {
        y[i] += a*x[i];
    }
}

static void xkv_scale_f32(int64_t n, float a, float * y) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] *= a;
    }
}

// the queries of a KV head over the exact tokens [j0, j1)
static void xkv_exact_span(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t head, int64_t span, int64_t j0, int64_t j1) {
    const int64_t dk = l.dim[XKV_K];
    const int64_t dv = l.dim[XKV_V];

    for (int64_t t = 0; t < l.n_tps; ++t) {
        for (int64_t g = 0; g < l.n_gqa; ++g) {
            const int64_t i = t*l.n_head + head*l.n_gqa + g;
            memset(b.exact.sums(span, i), 0, dv*sizeof(float));
            b.exact.max(span, i) = -INFINITY;
            b.exact.sum(span, i) = 0.0f;
        }
    }
    for (int64_t j = j0; j < j1; j += XKV_EXACT_BLOCK) {
        const int64_t n = std::min(XKV_EXACT_BLOCK, j1 - j);
        bool have = false;
        for (int64_t t = 0; t < l.n_tps; ++t) {
            float bias[XKV_EXACT_BLOCK];
            bool  any = false;
            for (int64_t k = 0; k < XKV_EXACT_BLOCK; ++k) {
                bias[k] = k < n ? l.mask_at(j + k, t, s) : -INFINITY;
                any = any || bias[k] > -INFINITY;
            }
            if (!any) {
                continue;
            }
            for (int64_t k = 0; k < n && !have; ++k) {
                xkv_row_f32(l.k, j + k, head, s, b.row_k + k*dk);
                xkv_row_f32(l.v, j + k, head, s, b.row_v + k*dv);
            }
            have = true;
            for (int64_t g = 0; g < l.n_gqa; ++g) {
                const int64_t i    = t*l.n_head + head*l.n_gqa + g;
                const float * q    = l.query(i, s);
                float *       sums = b.exact.sums(span, i);
                float &       max  = b.exact.max(span, i);
                float &       sum  = b.exact.sum(span, i);

                float list[XKV_EXACT_BLOCK];
                for (int64_t k = 0; k < XKV_EXACT_BLOCK; ++k) {
                    list[k] = bias[k] + (k < n ? l.par.scale*xkv_dot_f32(dk, q, b.row_k + k*dk) : 0.0f);
                }
                const f32r score = xkv_load(list);
                const float m = std::max(max, xkv_max(score));
                if (m > max) {
                    const float f = max == -INFINITY ? 0.0f : expf(max - m);
                    xkv_scale_f32(dv, f, sums);
                    sum *= f;
                    max  = m;
                }
                const f32r p = xkv_exp(score - max);
                sum += xkv_sum(p);
                xkv_store(list, p);
                for (int64_t k = 0; k < n; ++k) {
                    xkv_add_f32(dv, list[k], b.row_v + k*dv, sums);
                }
            }
        }
    }
}

//
// stored tokens
//

static xkv_rounded xkv_at(const float * x, const int8_t * c, const float * s, const int32_t * n, int64_t row, int64_t stride, int64_t col) {
    const int64_t at = row*stride + col;
    return { x + at, c + at, s + at/32, n + at/32 };
}

struct xkv_decode_span {
    const xkv_attn_layer &     l;
    const xkv_decode_buffers & b;

    const int64_t s;
    const int64_t span;
    const int64_t n_query;
    const int64_t n_chunk;
    const int64_t n_fine;
    const int64_t dim;    // stride of qf
    const int64_t stride; // of y

    xkv_decode_span(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t span) :
        l(l), b(b), s(s), span(span), n_query(l.n_query), n_chunk(l.n_chunk), n_fine(l.n_chunk/XKV_ATTN_FINE), dim((l.dim[XKV_K] + 31)/32*32),
        stride((l.rank[XKV_K] + 31)/32*32) {}

    // where a kind's coefficients of a segment begin for a query's KV head
    const uint8_t * coef(int64_t ic, int kd, const xkv_attn_segment & seg, int64_t head) const {
        return l.chunk(ic, s) + seg.coef + (l.plain ? head*l.head_coef[kd] : 0);
    }

    // query i in the chunk's frame
    void turn_query(int64_t ic, int64_t i) const {
        const int64_t n    = l.dim[XKV_K];
        const float * mean = l.mean_k(l.head_kv(i));

        float * x = b.qf + i*dim;
        l.rotate(ic, s, l.query(i, s), x);
        f32r sum = {};
        for (int64_t j = 0; j < n; j += 16) {
            const f32r y = xkv_load(x + j)*l.par.scale;
            xkv_store(x + j, y);
            sum += y*xkv_load(mean + j);
        }
        for (int64_t j = n; j < dim; ++j) {
            x[j] = 0.0f;
        }
        b.mean[i] = xkv_sum(sum);
        xkv_round(x, dim, b.qc + i*dim, b.qs + i*dim/32, b.qn + i*dim/32);
    }

    // queries list[0 .. n) of one KV head through directions [d0, d1) of the basis
    void project(const int64_t * list, int n, int64_t d0, int64_t d1) const {
        if (l.plain) {
            for (int k = 0; k < n; ++k) {
                const int64_t i = list[k];
                memcpy(b.y  + i*stride,    b.qf + i*dim,    l.dim[XKV_K]*sizeof(float));
                memcpy(b.yc + i*stride,    b.qc + i*dim,    l.dim[XKV_K]);
                memcpy(b.ys + i*stride/32, b.qs + i*dim/32, dim/32*sizeof(float));
                memcpy(b.yn + i*stride/32, b.qn + i*dim/32, dim/32*sizeof(int32_t));
            }
            return;
        }
        const int64_t   head = l.head_kv(list[0]);
        const uint8_t * base = l.bases(XKV_K, head);
        for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
            const auto &  seg  = l.segments[XKV_K][is];
            const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
            const int64_t r1   = std::min(d1 - seg.first, seg.rank);
            const size_t  tile = xkv_tile_bytes(seg.type_basis, 16, l.dim[XKV_K]);
            for (int64_t r = r0; r < r1; r += 16) {
                for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                    const int m = std::min(XKV_DOT_MAX, n - k0);
                    xkv_rounded y[XKV_DOT_MAX];
                    f32r res[XKV_DOT_MAX] = {};
                    for (int k = 0; k < m; ++k) {
                        y[k] = xkv_at(b.qf, b.qc, b.qs, b.qn, list[k0 + k], dim, 0);
                    }
                    xkv_dot_tiles(m, seg.type_basis, base + seg.basis + r/16*tile, l.dim[XKV_K], y, res);
                    for (int k = 0; k < m; ++k) {
                        xkv_store(b.y + list[k0 + k]*stride + seg.first + r, res[k]);
                    }
                }
            }
        }
        for (int k = 0; k < n; ++k) {
            const int64_t at = list[k]*stride + d0;
            xkv_round(b.y + at, (d1 - d0 + 31)/32*32, b.yc + at, b.ys + at/32, b.yn + at/32);
        }
    }

    // adds directions [d0, d1) to the scores of 16 tokens from t0 on
    void add_scores(int64_t ic, const int64_t * list, int n, int64_t head, int64_t t0, int64_t d0, int64_t d1) const {
        for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
            const int m = std::min(XKV_DOT_MAX, n - k0);
            f32r res[XKV_DOT_MAX];
            for (int k = 0; k < m; ++k) {
                res[k] = xkv_load(b.score + list[k0 + k]*n_chunk + t0);
            }
            for (int is = 0; is < l.n_segment[XKV_K]; ++is) {
                const auto &  seg = l.segments[XKV_K][is];
                const int64_t r0  = std::max(d0 - seg.first, (int64_t) 0);
                const int64_t r1  = std::min(d1 - seg.first, seg.rank);
                if (r0 >= r1) {
                    continue;
                }
                xkv_rounded y[XKV_DOT_MAX];
                for (int k = 0; k < m; ++k) {
                    y[k] = xkv_at(b.y, b.yc, b.ys, b.yn, list[k0 + k], stride, seg.first + r0);
                }
                const uint8_t * tiles = coef(ic, XKV_K, seg, head) + t0/16*xkv_tile_bytes(seg.type, 16, seg.rank) + xkv_tile_bytes(seg.type, 16, r0);
                xkv_dot_tiles(m, seg.type, tiles, r1 - r0, y, res);
            }
            for (int k = 0; k < m; ++k) {
                xkv_store(b.score + list[k0 + k]*n_chunk + t0, res[k]);
            }
        }
    }

    void mask_tail(int64_t i, int64_t n) const {
        for (int64_t t = n; t < n_chunk; ++t) {
            b.score[i*n_chunk + t] = -INFINITY;
        }
    }

    float max_score(int64_t i) const {
        f32r m = xkv_load(b.score + i*n_chunk);
        for (int64_t t = 16; t < n_chunk; t += 16) {
            m = xkv_max(m, xkv_load(b.score + i*n_chunk + t));
        }
        return xkv_max(m);
    }

    // the sums so far for a larger max
    void raise_max(int64_t i, float m) const {
        float & max = b.spans.max(span, i);
        if (m <= max) {
            return;
        }
        const float f = max == -INFINITY ? 0.0f : expf(max - m);
        xkv_scale_f32(b.spans.n, f, b.spans.sums(span, i));
        b.spans.sum(span, i) *= f;
        b.base[i]            *= f;
        max = m;
    }

    // weights of 16 tokens
    f32r weights(int64_t i, int64_t t) const { return xkv_exp(xkv_load(b.score + i*n_chunk + t) - b.spans.max(span, i)); }

    // turns scores into weights; false if no block is to be refined
    bool weigh_lead(int64_t i) const {
        float block[256/XKV_ATTN_FINE];
        float sum = 0.0f;
        for (int64_t f = 0; f < n_fine; ++f) {
            const f32r p = weights(i, 16*f);
            xkv_store(b.weight + i*n_chunk + 16*f, p);
            block[f] = xkv_sum(p);
            sum += block[f];
        }
        const float least = l.par.tolerance*(b.base[i] + b.spans.sum(span, i) + sum);
        bool any = false;
        for (int64_t f = 0; f < n_fine; ++f) {
            b.fine[i*n_fine + f] = block[f] > least;
            any = any || block[f] > least;
        }
        b.sum[i] = sum;
        return any;
    }

    // the same once blocks were refined
    void weigh_fine(int64_t i) const {
        f32r sum = {};
        for (int64_t t = 0; t < n_chunk; t += 16) {
            const f32r p = weights(i, t);
            xkv_store(b.weight + i*n_chunk + t, p);
            sum += p;
        }
        b.sum[i] = xkv_sum(sum);
    }

    void round_weights(int64_t i) const {
        xkv_round(b.weight + i*n_chunk, n_chunk, b.pc + i*n_chunk, b.ps + i*n_chunk/32, b.pn + i*n_chunk/32);
    }

    // adds directions [d0, d1) of V of the chunk's tokens, weighted
    void add_values(int64_t ic, const int64_t * list, int n, int64_t head, int64_t d0, int64_t d1) const {
        for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
            const auto &  seg  = l.segments[XKV_V][is];
            const int64_t r0   = std::max(d0 - seg.first, (int64_t) 0);
            const int64_t r1   = std::min(d1 - seg.first, seg.rank);
            const size_t  tile = xkv_tile_bytes(seg.type, 16, n_chunk);
            for (int64_t r = r0; r < r1; r += 16) {
                const uint8_t * tiles = coef(ic, XKV_V, seg, head) + r/16*tile;
                for (int k0 = 0; k0 < n; k0 += XKV_DOT_MAX) {
                    const int m = std::min(XKV_DOT_MAX, n - k0);
                    xkv_rounded y[XKV_DOT_MAX];
                    f32r res[XKV_DOT_MAX];
                    for (int k = 0; k < m; ++k) {
                        y[k]   = xkv_at(b.weight, b.pc, b.ps, b.pn, list[k0 + k], n_chunk, 0);
                        res[k] = xkv_load(b.spans.sums(span, list[k0 + k]) + seg.first + r);
                    }
                    xkv_dot_tiles(m, seg.type, tiles, n_chunk, y, res);
                    for (int k = 0; k < m; ++k) {
                        xkv_store(b.spans.sums(span, list[k0 + k]) + seg.first + r, res[k]);
                    }
                }
            }
        }
    }

    // the rest of V for a query's refined blocks
    void add_fine_values(int64_t ic, int64_t i) const {
        const int64_t head = l.head_kv(i);
        float * sums = b.spans.sums(span, i);
        for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
            const auto &  seg  = l.segments[XKV_V][is];
            const int64_t r0   = std::max(l.lead[XKV_V] - seg.first, (int64_t) 0);
            const int64_t cols = xkv_tile_cols(seg.type);
            const size_t  tile = xkv_tile_bytes(seg.type, 16, cols);
            for (int64_t t = 0; t < n_chunk && r0 < seg.rank; t += cols) {
                bool any = false;
                for (int64_t f = t/XKV_ATTN_FINE; f < std::min((t + cols)/XKV_ATTN_FINE, n_fine); ++f) {
                    any = any || b.fine[i*n_fine + f];
                }
                if (!any) {
                    continue;
                }
                const xkv_rounded y = xkv_at(b.weight, b.pc, b.ps, b.pn, i, n_chunk, t);
                for (int64_t r = r0; r < seg.rank; r += 16) {
                    const uint8_t * tiles = coef(ic, XKV_V, seg, head) + r/16*xkv_tile_bytes(seg.type, 16, n_chunk) + t/cols*tile;
                    f32r res = xkv_load(sums + seg.first + r);
                    xkv_dot_tiles(1, seg.type, tiles, cols, &y, &res);
                    xkv_store(sums + seg.first + r, res);
                }
            }
        }
    }

    // keeps the weights of refined blocks only
    void keep_fine(int64_t i) const {
        for (int64_t f = 0; f < n_fine; ++f) {
            if (!b.fine[i*n_fine + f]) {
                memset(b.weight + i*n_chunk + 16*f, 0, 16*sizeof(float));
            }
        }
        round_weights(i);
    }

    void run_chunk(int64_t ic) const {
        int64_t all[1024]; // queries that see the chunk, by KV head
        int64_t fine[1024];
        int     first[513];
        int     n_all = 0;
        for (int64_t h = 0; h < l.n_head_kv; ++h) {
            first[h] = n_all;
            for (int64_t t = 0; t < l.n_tps; ++t) {
                for (int64_t g = 0; g < l.n_gqa && l.n_fill(ic, t, s) > 0; ++g) {
                    all[n_all++] = t*l.n_head + h*l.n_gqa + g;
                }
            }
        }
        first[l.n_head_kv] = n_all;
        if (n_all == 0) {
            return;
        }
        const auto each_head = [&](auto && f) {
            for (int64_t h = 0; h < l.n_head_kv; ++h) {
                if (first[h] < first[h + 1]) {
                    f(h, all + first[h], first[h + 1] - first[h]);
                }
            }
        };
        // coefficients are the same for all heads, unless plain
        const auto each_list = [&](auto && f) {
            if (l.plain) {
                each_head(f);
            } else {
                f((int64_t) 0, all, n_all);
            }
        };
        for (int k = 0; k < n_all; ++k) {
            turn_query(ic, all[k]);
            f32r mean = xkv_set1(b.mean[all[k]]);
            for (int64_t t = 0; t < n_chunk; t += 16) {
                xkv_store(b.score + all[k]*n_chunk + t, mean);
            }
        }
        each_head([&](int64_t, const int64_t * list, int n) { project(list, n, 0, l.lead[XKV_K]); });
        each_list([&](int64_t h, const int64_t * list, int n) {
            for (int64_t t = 0; t < n_chunk; t += 16) {
                add_scores(ic, list, n, h, t, 0, l.lead[XKV_K]);
            }
        });

        const bool rest = l.lead[XKV_K] < l.rank[XKV_K] || l.lead[XKV_V] < l.rank[XKV_V];
        bool any[1024] = {};
        each_head([&](int64_t h, const int64_t * list, int n) {
            int n_fine_query = 0;
            for (int k = 0; k < n; ++k) {
                const int64_t i = list[k];
                mask_tail(i, l.n_fill(ic, i/l.n_head, s));
                raise_max(i, max_score(i));
                any[i] = weigh_lead(i) && rest;
                if (any[i]) {
                    fine[n_fine_query++] = i;
                }
            }
            if (n_fine_query > 0 && l.lead[XKV_K] < l.rank[XKV_K]) {
                project(fine, n_fine_query, l.lead[XKV_K], l.rank[XKV_K]);
                for (int64_t f = 0; f < n_fine; ++f) {
                    int64_t some[512];
                    int n_some = 0;
                    for (int k = 0; k < n_fine_query; ++k) {
                        if (b.fine[fine[k]*n_fine + f]) {
                            some[n_some++] = fine[k];
                        }
                    }
                    add_scores(ic, some, n_some, h, 16*f, l.lead[XKV_K], l.rank[XKV_K]);
                }
                for (int k = 0; k < n_fine_query; ++k) {
                    mask_tail(fine[k], l.n_fill(ic, fine[k]/l.n_head, s));
                    raise_max(fine[k], max_score(fine[k]));
                    weigh_fine(fine[k]);
                }
            }
            for (int k = 0; k < n; ++k) {
                b.spans.sum(span, list[k]) += b.sum[list[k]];
                round_weights(list[k]);
            }
        });
        each_list([&](int64_t h, const int64_t * list, int n) { add_values(ic, list, n, h, 0, l.lead[XKV_V]); });
        for (int k = 0; k < n_all; ++k) {
            if (any[all[k]] && l.lead[XKV_V] < l.rank[XKV_V]) {
                keep_fine(all[k]);
                add_fine_values(ic, all[k]);
            }
        }
    }

    void run(int64_t ic0, int64_t ic1) const {
        for (int64_t i = 0; i < n_query; ++i) {
            float m = -INFINITY;
            float e = 0.0f;
            for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
                m = std::max(m, b.exact.max(k, i));
            }
            for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
                e += m > -INFINITY ? b.exact.sum(k, i)*expf(b.exact.max(k, i) - m) : 0.0f;
            }
            memset(b.spans.sums(span, i), 0, b.spans.n*sizeof(float));
            b.spans.max(span, i) = m;
            b.spans.sum(span, i) = 0.0f;
            b.base[i] = e;
        }
        for (int64_t ic = ic0; ic < ic1; ++ic) {
            run_chunk(ic);
        }
    }
};

// sums of all spans of a query, through the basis of V
static void xkv_merge(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t n_span, int64_t i) {
    const int64_t n_v = l.dim[XKV_V];

    float max = -INFINITY;
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        max = std::max(max, b.exact.max(k, i));
    }
    for (int64_t k = 0; k < n_span; ++k) {
        max = b.spans.sum(k, i) > 0.0f ? std::max(max, b.spans.max(k, i)) : max;
    }
    float * o   = l.out(i, s);
    float   sum = 0.0f;
    memset(o, 0, n_v*sizeof(float));
    for (int64_t k = 0; k < XKV_N_EXACT; ++k) {
        if (b.exact.sum(k, i) > 0.0f) {
            const float f = expf(b.exact.max(k, i) - max);
            sum += f*b.exact.sum(k, i);
            xkv_add_f32(n_v, f, b.exact.sums(k, i), o);
        }
    }
    if (n_span > 0) {
        const int64_t n = l.plain ? n_v : (l.rank[XKV_V] + 31)/32*32;

        float * acc = b.y; // of the thread, free by now
        memset(acc, 0, n*sizeof(float));
        for (int64_t k = 0; k < n_span; ++k) {
            if (b.spans.sum(k, i) > 0.0f) {
                const float f = expf(b.spans.max(k, i) - max);
                sum += f*b.spans.sum(k, i);
                xkv_add_f32(l.rank[XKV_V], f, b.spans.sums(k, i), acc);
            }
        }
        if (l.plain) {
            xkv_add_f32(n_v, 1.0f, acc, o);
        } else {
            xkv_round(acc, n, b.yc, b.ys, b.yn);
            const uint8_t * base = l.bases(XKV_V, l.head_kv(i));
            for (int64_t c = 0; c < n_v; c += 16) {
                f32r res = xkv_load(o + c);
                for (int is = 0; is < l.n_segment[XKV_V]; ++is) {
                    const auto & seg = l.segments[XKV_V][is];
                    const xkv_rounded y = xkv_at(acc, b.yc, b.ys, b.yn, 0, 0, seg.first);
                    xkv_dot_tiles(1, seg.type_basis, base + seg.basis + c/16*xkv_tile_bytes(seg.type_basis, 16, seg.rank), seg.rank, &y, &res);
                }
                xkv_store(o + c, res);
            }
        }
    }
    xkv_scale_f32(n_v, sum > 0.0f ? 1.0f/sum : 0.0f, o);
}

void xkv_attn_decode(const xkv_attn_layer & l, int ith, int nth, char * work, xkv_barrier_t barrier, void * user) {
    const xkv_decode_buffers b = xkv_lay_out(l, work, ith, nth);

    const int64_t n_span = std::min(XKV_N_SPAN, l.n_frame);
    for (int64_t s = 0; s < l.n_stream; ++s) {
        int64_t u0, u1;
        xkv_share(l.n_head_kv*XKV_N_EXACT, ith, nth, &u0, &u1);
        for (int64_t u = u0; u < u1; ++u) {
            const int64_t e = u % XKV_N_EXACT;
            xkv_exact_span(l, b, s, u/XKV_N_EXACT, e, l.n_exact*e/XKV_N_EXACT, l.n_exact*(e + 1)/XKV_N_EXACT);
        }
        barrier(user);
        xkv_share(n_span, ith, nth, &u0, &u1);
        for (int64_t u = u0; u < u1; ++u) {
            xkv_decode_span(l, b, s, u).run(l.n_frame*u/n_span, l.n_frame*(u + 1)/n_span);
        }
        barrier(user);
        xkv_share(l.n_query, ith, nth, &u0, &u1);
        for (int64_t u = u0; u < u1; ++u) {
            xkv_merge(l, b, s, n_span, u);
        }
        barrier(user);
    }
}
