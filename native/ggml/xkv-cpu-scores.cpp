// Scores of stored tokens and window: queries through the basis of K (unless plain), then times coefficients and cells.

#include "xkv-cpu-kernels.h"

// parts of a query that went through the basis, see XKV_CPU_N_COEF
struct xkv_coef_row {
    float *  f32;
    int8_t * codes;
    float *  scales;
    float *  sums;
    float *  mean;

    xkv_coef_row() = default;
    xkv_coef_row(void * data, int64_t rank) :
        f32((float *) data), codes((int8_t *) (f32 + rank)), scales(f32 + rank + rank/4), sums(scales + rank/32),
        mean(sums + rank/32) {}

    // numbers d .. d + n - 1, as bytes or as f32
    void set(const float * x, int64_t d, int64_t n, bool i8) const {
        if (i8) {
            xkv_cpu_round_i8(x, codes + d, scales + d/32, sums + d/32, n);
        } else {
            memcpy(f32 + d, x, n*sizeof(float));
        }
    }
};

// dst [n_embd_head][32]: directions d0 .. d0 + 31 of the basis for one head, transposed
static void xkv_load_basis(const xkv_cpu_rows & basis, int64_t d0, int64_t head, int64_t n_embd_head, float * dst) {
    const size_t offset = ggml_row_size(basis.type, head*n_embd_head);

    float row[8][XKV_CPU_MAX_HEAD + 8];
    for (int64_t d = 0; d < 32; d += 8) {
        for (int64_t r = 0; r < 8; ++r) {
            xkv_cpu_to_f32(basis.type, basis.data + (d0 + d + r)*basis.nb1 + offset, row[r], n_embd_head);
        }
        int64_t k = 0;
#if defined(__AVX2__)
        for (; k + 8 <= n_embd_head; k += 8) {
            __m256 x[8];
            __m256 y[8];
            for (int r = 0; r < 8; ++r) {
                x[r] = _mm256_loadu_ps(row[r] + k);
            }
            for (int r = 0; r < 8; r += 2) {
                y[r]     = _mm256_unpacklo_ps(x[r], x[r + 1]);
                y[r + 1] = _mm256_unpackhi_ps(x[r], x[r + 1]);
            }
            for (int r = 0; r < 8; r += 4) {
                x[r]     = _mm256_shuffle_ps(y[r],     y[r + 2], 0x44);
                x[r + 1] = _mm256_shuffle_ps(y[r],     y[r + 2], 0xee);
                x[r + 2] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0x44);
                x[r + 3] = _mm256_shuffle_ps(y[r + 1], y[r + 3], 0xee);
            }
            for (int r = 0; r < 4; ++r) {
                _mm256_storeu_ps(dst + 32*(k + r)     + d, _mm256_permute2f128_ps(x[r], x[r + 4], 0x20));
                _mm256_storeu_ps(dst + 32*(k + r + 4) + d, _mm256_permute2f128_ps(x[r], x[r + 4], 0x31));
            }
        }
#endif
        for (; k < n_embd_head; ++k) {
            for (int64_t r = 0; r < 8; ++r) {
                dst[32*k + d + r] = row[r][k];
            }
        }
    }
}

void xkv_cpu_project(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &        l = *(const xkv_cpu_layer *) userdata;
    const ggml_tensor * q = dst->src[0];

    const int64_t n_embd_head = q->ne[0];
    const int64_t n_query     = q->ne[1];
    const int64_t n_frame     = l.n_frame;
    const int64_t n_stream    = dst->ne[3];
    const int64_t n_head      = l.n_head;
    const int64_t n_gqa       = n_head/l.n_head_kv;
    const int64_t rank        = l.rank[0];
    GGML_ASSERT(n_embd_head <= XKV_CPU_MAX_HEAD);

    float basis[32*XKV_CPU_MAX_HEAD];

    const auto q_row = [&](int64_t s, int64_t f, int64_t i) {
        return (const float *) ((const char *) q->data + i*q->nb[1] + (s*n_frame + f)*q->nb[2]);
    };
    const auto c_row = [&](int64_t s, int64_t f, int64_t i) {
        return xkv_coef_row((char *) dst->data + i*dst->nb[1] + f*dst->nb[2] + s*dst->nb[3], rank);
    };

    for (int64_t s = 0; s < n_stream; ++s) {
        const uint32_t * fill = l.fill + s*n_frame;

        int64_t n_used = 0;
        for (int64_t f = 0; f < n_frame; ++f) {
            n_used += fill[f] > 0;
        }
        if (n_used == 0) {
            continue;
        }

        // queries of a KV head are consecutive within a token
        const int64_t n_tile = l.plain ? 0 : rank/32;
        const int64_t u0     = n_tile*l.n_head_kv*ith/nth;
        const int64_t u1     = n_tile*l.n_head_kv*(ith + 1)/nth;
        for (int64_t u = u0; u < u1; ++u) {
            const int64_t head = u/n_tile;
            const int64_t d    = u%n_tile*32;

            const auto * seg = l.segments[0] + s*l.n_segment[0];
            while (seg->first + seg->rank <= d) {
                seg++;
            }
            xkv_load_basis(seg->basis, d - seg->first, head, n_embd_head, basis);

            // at most 6 rows at once
            const float * a[6];
            float *       c[6];
            char *        to[6];
            float         tile[6][32];
            int           m = 0;

            const bool i8      = xkv_cpu_is_i8(seg->coef.type);
            const auto project = [&]() {
                memset(tile, 0, sizeof(tile));
                xkv_mul_32(m, n_embd_head, a, basis, c);
                for (int r = 0; r < m; ++r) {
                    xkv_coef_row(to[r], rank).set(tile[r], d, 32, i8);
                }
                m = 0;
            };
            for (int r = 0; r < 6; ++r) {
                c[r] = tile[r];
            }
            for (int64_t f = 0; f < n_frame; ++f) {
                for (int64_t i = head*n_gqa; fill[f] > 0 && i < n_query; i += n_head) {
                    for (int64_t g = 0; g < n_gqa; ++g) {
                        a [m] = q_row(s, f, i + g);
                        to[m] = (char *) c_row(s, f, i + g).f32;
                        if (++m == 6) {
                            project();
                        }
                    }
                }
            }
            if (m > 0) {
                project();
            }
        }

        for (int64_t f = ith; f < n_frame; f += nth) {
            for (int64_t i = 0; fill[f] > 0 && i < n_query; ++i) {
                const float * x    = q_row(s, f, i);
                const float * mean = l.mean_k + i%n_head/n_gqa*n_embd_head;

                float sum = 0.0f;
                for (int64_t k = 0; k < n_embd_head; ++k) {
                    sum += x[k]*mean[k];
                }
                *c_row(s, f, i).mean = sum;
                if (l.plain) {
                    c_row(s, f, i).set(x, 0, rank, xkv_cpu_is_i8(l.segments[0]->coef.type));
                }
            }
        }
    }
}

// queries that are scored at once
#define XKV_CPU_N_SCORE 32

// scores of tokens 4*i0 .. 4*i1 - 1 of a chunk for n_q queries
template <typename Q>
static void xkv_score_chunk(const xkv_cpu_layer & l, const xkv_cpu_segment * segments, const ggml_tensor * q_coef, ggml_tensor * dst,
                            int64_t s, int64_t f, int64_t i0, int64_t i1, int64_t n_q, Q && query) {
    const int64_t n_head = dst->ne[2];
    const int64_t rank   = l.rank[0];

    float  buf    [4*XKV_CPU_STRIDE];
    int8_t codes  [4*XKV_CPU_STRIDE];
    float  scales [4*XKV_CPU_STRIDE/32];
    float  offsets[4*XKV_CPU_STRIDE/32];

    // how a segment's coefficients are multiplied
    enum way { WAY_F32, WAY_UNSIGNED, WAY_SIGNED };

    const auto way_of = [](const xkv_cpu_segment & seg) {
        return !xkv_cpu_is_i8(seg.coef.type) ? WAY_F32 : seg.coef.type == GGML_TYPE_Q8_0 ? WAY_SIGNED : WAY_UNSIGNED;
    };

    // divisions take as long as a short product
    xkv_coef_row q_rows[XKV_CPU_N_SCORE];
    float *      d_rows[XKV_CPU_N_SCORE];
    for (int64_t j = 0; j < n_q; ++j) {
        const int64_t i = query(j);
        q_rows[j] = xkv_coef_row((char *) q_coef->data + i*q_coef->nb[1] + f*q_coef->nb[2] + s*q_coef->nb[3], rank);
        d_rows[j] = (float *) ((char *) dst->data + i%n_head*dst->nb[2] + i/n_head*dst->nb[1] + s*dst->nb[3]) + f*l.n_chunk;
        std::fill_n(d_rows[j] + 4*i0, 4*(i1 - i0), *q_rows[j].mean);
    }
    for (int64_t d = 0, n; d < rank; d += n) {
        way w = WAY_F32;
        n = xkv_block_ranks(segments, l.n_segment[0], d, way_of);
        for (int64_t i = i0; i < i1; ++i) {
            const int64_t slot = f*l.n_chunk + 4*i;
            xkv_each_part(segments, l.n_segment[0], d, n, [&](const xkv_cpu_segment & seg, int64_t off, int64_t n_part, int64_t at) {
                w = way_of(seg);
                for (int64_t r = 0; r < 4; ++r) {
                    const char *  row = seg.coef.data + (slot + r)*seg.coef.nb1 + ggml_row_size(seg.coef.type, off);
                    const int64_t to  = r*XKV_CPU_STRIDE + at;
                    if (w != WAY_F32) {
                        xkv_cpu_to_i8(seg.coef.type, row, codes + to, scales + to/32, offsets + to/32, n_part);
                    } else {
                        xkv_cpu_to_f32(seg.coef.type, row, buf + to, n_part);
                    }
                }
            });
            const auto to = [&](int64_t j) { return d_rows[j] + 4*i; };
            if (w != WAY_F32) {
                const xkv_i8 x = { codes, scales, w == WAY_UNSIGNED ? offsets : nullptr };
                xkv_add_dots(n, 4, x, XKV_CPU_STRIDE, n_q, [&](int64_t j) {
                    return xkv_i8{ q_rows[j].codes + d, q_rows[j].scales + d/32, q_rows[j].sums + d/32 };
                }, to);
            } else {
                xkv_add_dots(n, 4, (const float *) buf, XKV_CPU_STRIDE, n_q, [&](int64_t j) -> const float * { return q_rows[j].f32 + d; }, to);
            }
        }
    }
}

// scores of cells 4*i0 to 4*i1 of the window, which begins at slot n_slot of dst
static void xkv_score_window(const ggml_tensor * q, const ggml_tensor * k, ggml_tensor * dst, int64_t n_slot, int64_t s, int64_t i0, int64_t i1) {
    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head      = q->ne[1];
    const int64_t n_tps       = q->ne[2];
    const int64_t n_head_kv   = k->ne[1];
    const int64_t n_kv        = k->ne[2];
    const int64_t n_gqa       = n_head/n_head_kv;

    float buf[4*XKV_CPU_STRIDE];

    for (int64_t c = 4*i0; c < 4*i1; c += 4) {
        const int n_row = (int) std::min<int64_t>(4, n_kv - c);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            for (int64_t r = 0; r < 4; ++r) {
                const int64_t cell = std::min(c + r, n_kv - 1);
                xkv_cpu_to_f32(k->type, (const char *) k->data + h*k->nb[1] + cell*k->nb[2] + s*k->nb[3], buf + r*XKV_CPU_STRIDE, n_embd_head);
            }
            const auto d_row = [&](int64_t i) {
                return (float *) ((char *) dst->data + (h*n_gqa + i%n_gqa)*dst->nb[2] + i/n_gqa*dst->nb[1] + s*dst->nb[3]) + n_slot + c;
            };
            for (int64_t i = 0; i < n_gqa*n_tps; ++i) {
                std::fill_n(d_row(i), n_row, 0.0f);
            }
            xkv_add_dots(n_embd_head, n_row, (const float *) buf, XKV_CPU_STRIDE, n_gqa*n_tps, [&](int64_t i) {
                return (const float *) ((const char *) q->data + (h*n_gqa + i%n_gqa)*q->nb[1] + i/n_gqa*q->nb[2] + s*q->nb[3]);
            }, d_row);
        }
    }
}

void xkv_cpu_scores(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &        l      = *(const xkv_cpu_layer *) userdata;
    const ggml_tensor * q      = dst->src[0];
    const ggml_tensor * k      = dst->src[1];
    const ggml_tensor * q_coef = dst->src[2];

    const int64_t n_query = q->ne[1]*q->ne[2];
    const int64_t n_slot  = l.n_frame*l.n_chunk;

    for (int64_t s = 0; s < dst->ne[3]; ++s) {
        const uint32_t * fill = l.fill + s*l.n_frame;

        // 4 tokens or cells are an item; what is read from memory and converted counts like some queries
        int64_t n_item = 0;
        for (int64_t f = 0; f < l.n_frame; ++f) {
            n_item += (fill[f] + 3)/4;
        }
        const int64_t  n_set = l.plain ? l.n_head_kv : 1; // of queries that meet the same numbers
        const int64_t  n_gqa = l.n_head/n_set;
        const xkv_work work  = { { n_item, (k->ne[2] + 3)/4 }, { l.rank[0]*(n_query + 4*n_set), k->ne[0]*(2*n_query + 4*k->ne[1]) } };

        int64_t begin[2];
        int64_t end[2];
        work.split(ith, nth, begin, end);

        int64_t first = 0;
        for (int64_t f = 0; f < l.n_frame; ++f) {
            const int64_t n  = (fill[f] + 3)/4;
            const int64_t i0 = std::max(begin[0] - first, (int64_t) 0);
            const int64_t i1 = std::min(end[0]   - first, n);
            for (int64_t h = 0; i0 < i1 && h < n_set; ++h) {
                const auto * segments = l.segments[0] + s*l.n_segment[0];
                auto         head     = *segments;
                head.rank       = l.rank[0];
                head.coef.data += ggml_row_size(head.coef.type, h*l.rank[0]);
                for (int64_t q0 = 0; q0 < n_query/n_set; q0 += XKV_CPU_N_SCORE) {
                    const int64_t n_q = std::min<int64_t>(XKV_CPU_N_SCORE, n_query/n_set - q0);
                    xkv_score_chunk(l, l.plain ? &head : segments, q_coef, dst, s, f, i0, i1, n_q, [&](int64_t j) {
                        return (q0 + j)/n_gqa*l.n_head + h*n_gqa + (q0 + j)%n_gqa;
                    });
                }
            }
            // masked, but the mask is added
            for (int64_t i = 0; f%nth == ith && i < n_query; ++i) {
                float * row = (float *) ((char *) dst->data + i%dst->ne[2]*dst->nb[2] + i/dst->ne[2]*dst->nb[1] + s*dst->nb[3]);
                std::fill_n(row + f*l.n_chunk + 4*n, l.n_chunk - 4*n, 0.0f);
            }
            first += n;
        }
        xkv_score_window(q, k, dst, n_slot, s, begin[1], end[1]);
    }
}
