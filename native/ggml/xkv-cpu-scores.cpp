// Scores of stored tokens and window: queries through the basis of K, then times coefficients and cells.

#include "xkv-cpu-kernels.h"

// columns [row_size*32]: rows d0 .. d0 + 31 of the basis for one head, transposed
static void xkv_load_basis(const xkv_cpu_rows & basis, int64_t d0, int64_t head, int64_t n_embd_head, float * dst) {
    const size_t offset = ggml_row_size(basis.type, head*n_embd_head);

    float row[8][XKV_CPU_BLOCK];
    for (int64_t d = 0; d < 32; d += 8) {
        for (int64_t r = 0; r < 8; ++r) {
            xkv_cpu_to_f32(basis.type, basis.data + (d0 + d + r)*basis.nb1 + offset, row[r], n_embd_head);
        }
        for (int64_t k = 0; k < n_embd_head; ++k) {
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
    GGML_ASSERT(n_embd_head <= XKV_CPU_BLOCK);

    float basis[32*XKV_CPU_BLOCK];

    const auto q_row = [&](int64_t s, int64_t f, int64_t i) {
        return (const float *) ((const char *) q->data + i*q->nb[1] + (s*n_frame + f)*q->nb[2]);
    };
    const auto c_row = [&](int64_t s, int64_t f, int64_t i) {
        return (float *) ((char *) dst->data + i*dst->nb[1] + f*dst->nb[2] + s*dst->nb[3]);
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
        const int64_t n_tile = rank/32;
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

            const float * a[6];
            float *       c[6];
            int           m = 0;
            for (int64_t f = 0; f < n_frame; ++f) {
                for (int64_t i = 0; fill[f] > 0 && i < n_query; i += n_head) {
                    for (int64_t g = 0; g < n_gqa; ++g) {
                        a[m] = q_row(s, f, i + head*n_gqa + g);
                        c[m] = c_row(s, f, i + head*n_gqa + g) + d;
                        memset(c[m], 0, 32*sizeof(float));
                        if (++m == 6) {
                            xkv_mul_32(m, n_embd_head, a, basis, c);
                            m = 0;
                        }
                    }
                }
            }
            if (m > 0) {
                xkv_mul_32(m, n_embd_head, a, basis, c);
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
                c_row(s, f, i)[rank] = sum;
            }
        }
    }
}

// scores of tokens 4*i0 to 4*i1 of a chunk
static void xkv_score_chunk(const xkv_cpu_layer & l, const xkv_cpu_segment * segments, const ggml_tensor * q_coef, ggml_tensor * dst,
                            int64_t s, int64_t f, int64_t i0, int64_t i1) {
    const int64_t n_query = q_coef->ne[1];
    const int64_t n_head  = dst->ne[2];
    const int64_t rank    = l.rank[0];

    float buf[4*XKV_CPU_STRIDE];

    const char * q_data = (const char *) q_coef->data + f*q_coef->nb[2] + s*q_coef->nb[3];
    const auto   q_row  = [&](int64_t i) { return (const float *) (q_data + i*q_coef->nb[1]); };

    char *     d_data = (char *) dst->data + s*dst->nb[3];
    const auto d_row  = [&](int64_t i, int64_t slot) {
        return (float *) (d_data + i%n_head*dst->nb[2] + i/n_head*dst->nb[1]) + slot;
    };

    for (int64_t i = 0; i < n_query; ++i) {
        std::fill_n(d_row(i, f*l.n_chunk + 4*i0), 4*(i1 - i0), q_row(i)[rank]);
    }
    for (int64_t d = 0, n; d < rank; d += n) {
        n = xkv_block_ranks(segments, l.n_segment[0], d);
        for (int64_t i = i0; i < i1; ++i) {
            const int64_t slot = f*l.n_chunk + 4*i;
            xkv_each_part(segments, l.n_segment[0], d, n, [&](const xkv_cpu_segment & seg, int64_t off, int64_t n_part, int64_t at) {
                for (int64_t r = 0; r < 4; ++r) {
                    const char * row = seg.coef.data + (slot + r)*seg.coef.nb1 + ggml_row_size(seg.coef.type, off);
                    xkv_cpu_to_f32(seg.coef.type, row, buf + r*XKV_CPU_STRIDE + at, n_part);
                }
            });
            xkv_add_dots(n, 4, buf, XKV_CPU_STRIDE, n_query, [&](int64_t j) { return q_row(j) + d; },
                         [&](int64_t j) { return d_row(j, slot); });
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
            xkv_add_dots(n_embd_head, n_row, buf, XKV_CPU_STRIDE, n_gqa*n_tps, [&](int64_t i) {
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
        const xkv_work work = { { n_item, (k->ne[2] + 3)/4 }, { l.rank[0]*(n_query + 4), k->ne[0]*(2*n_query + 4*k->ne[1]) } };

        int64_t begin[2];
        int64_t end[2];
        work.split(ith, nth, begin, end);

        int64_t first = 0;
        for (int64_t f = 0; f < l.n_frame; ++f) {
            const int64_t n  = (fill[f] + 3)/4;
            const int64_t i0 = std::max(begin[0] - first, (int64_t) 0);
            const int64_t i1 = std::min(end[0]   - first, n);
            if (i0 < i1) {
                xkv_score_chunk(l, l.segments[0] + s*l.n_segment[0], q_coef, dst, s, f, i0, i1);
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
