// Output of stored tokens and window: softmax, weights times the coefficients of V and the cells, then through the basis (unless plain).

#include "xkv-cpu-kernels.h"

#include "vec.h"

#include <cmath>

// queries that are weighted at once
#define XKV_CPU_N_QUERY 16

// exp(score - largest score) of some queries for the slots or cells of a block
struct xkv_weights {
    int64_t first; // query
    int64_t count;

    float max[XKV_CPU_N_QUERY];
    float sum[XKV_CPU_N_QUERY];

    float  f32   [XKV_CPU_N_QUERY][XKV_CPU_BLOCK];
    int8_t codes [XKV_CPU_N_QUERY][XKV_CPU_BLOCK];
    float  scales[XKV_CPU_N_QUERY][XKV_CPU_BLOCK/32];
    float  sums  [XKV_CPU_N_QUERY][XKV_CPU_BLOCK/32];
};

// scaled and masked scores of a query for n slots or cells from s0 on
static void xkv_logits(const ggml_tensor * kq, const ggml_tensor * mask, float scale, int64_t i, int64_t s, int64_t s0, int64_t n, float * dst) {
    const int64_t h = i%kq->ne[2];
    const int64_t t = i/kq->ne[2];

    const char * m = (const char *) mask->data + t*mask->nb[1] + s%mask->ne[3]*mask->nb[3] + s0*mask->nb[0];
    xkv_cpu_to_f32(mask->type, m, dst, n);

    const float * x = (const float *) ((const char *) kq->data + h*kq->nb[2] + t*kq->nb[1] + s*kq->nb[3]) + s0;
    for (int64_t k = 0; k < n; ++k) {
        dst[k] += scale*x[k];
    }
}

static float xkv_max(const float * x, int64_t n, float max) {
    int64_t k = 0;
#if defined(__AVX2__)
    // compilers do not use vectors here, the order of comparisons matters to them
    __m256 m[4];
    std::fill_n(m, 4, _mm256_set1_ps(max));
    for (; k + 32 <= n; k += 32) {
        for (int j = 0; j < 4; ++j) {
            m[j] = _mm256_max_ps(m[j], _mm256_loadu_ps(x + k + 8*j));
        }
    }
    float t[8];
    _mm256_storeu_ps(t, _mm256_max_ps(_mm256_max_ps(m[0], m[1]), _mm256_max_ps(m[2], m[3])));
    max = *std::max_element(t, t + 8);
#endif
    for (; k < n; ++k) {
        max = std::max(max, x[k]);
    }
    return max;
}

// those of the weighted queries that belong to a KV head
static int xkv_queries_of(const xkv_weights & w, int64_t n_head, int64_t n_gqa, int64_t head, int64_t * query) {
    int n = 0;
    for (int64_t j = 0; j < w.count; ++j) {
        if ((w.first + j)%n_head/n_gqa == head) {
            query[n++] = j;
        }
    }
    return n;
}

// sums of directions 4*i0 .. 4*i1 - 1 over n slots from s0 on; of a plain store, those of a head for its queries
static void xkv_gather_slots(const xkv_cpu_layer & l, const xkv_cpu_segment * seg, const xkv_weights & w, ggml_tensor * dst, int64_t s, int64_t s0,
                             int64_t n, int64_t i0, int64_t i1) {
    const int64_t n_set = l.plain ? l.n_head_kv : 1;

    int64_t query[XKV_CPU_N_QUERY];
    int64_t head    = -1;
    int     n_query = 0;

    float  buf    [4*XKV_CPU_STRIDE];
    int8_t codes  [4*XKV_CPU_STRIDE];
    float  scales [4*XKV_CPU_STRIDE/32];
    float  offsets[4*XKV_CPU_STRIDE/32];

    for (int64_t i = i0; i < i1; ++i) {
        while (seg->first + seg->rank <= 4*i) {
            seg++;
        }
        const int64_t base = l.plain ? 4*i/l.rank[1]*l.rank[1] : 0;
        if (head != base/l.rank[1]) {
            head    = base/l.rank[1];
            n_query = xkv_queries_of(w, l.n_head, l.n_head/n_set, head, query);
        }
        if (n_query == 0) {
            continue;
        }
        const bool i8 = xkv_cpu_is_i8(seg->coef.type);
        for (int64_t r = 0; r < 4; ++r) {
            const char *  row = seg->coef.data + (4*i + r - seg->first)*seg->coef.nb1 + ggml_row_size(seg->coef.type, s0);
            const int64_t to  = r*XKV_CPU_STRIDE;
            if (i8) {
                xkv_cpu_to_i8(seg->coef.type, row, codes + to, scales + to/32, offsets + to/32, n);
            } else {
                xkv_cpu_to_f32(seg->coef.type, row, buf + to, n);
            }
        }
        const auto to = [&](int64_t k) { return (float *) ((char *) dst->data + (w.first + query[k])*dst->nb[1] + s*dst->nb[2]) + 4*i - base; };
        if (i8) {
            const xkv_i8 x = { codes, scales, seg->coef.type == GGML_TYPE_Q8_0 ? nullptr : offsets };
            xkv_add_dots(n, 4, x, XKV_CPU_STRIDE, n_query, [&](int64_t k) {
                return xkv_i8{ w.codes[query[k]], w.scales[query[k]], w.sums[query[k]] };
            }, to);
        } else {
            xkv_add_dots(n, 4, (const float *) buf, XKV_CPU_STRIDE, n_query, [&](int64_t k) { return w.f32[query[k]]; }, to);
        }
    }
}

// sums of up to 32 channels of a KV head from c0 on over n cells from k0 on
static void xkv_gather_window(const ggml_tensor * v, const xkv_weights & w, ggml_tensor * dst, int64_t n_head, int64_t rank, int64_t s,
                              int64_t k0, int64_t n, int64_t head, int64_t c0) {
    const int64_t n_gqa     = n_head/v->ne[1];
    const int64_t n_channel = std::min<int64_t>(32, v->ne[0] - c0);

    int64_t   query[XKV_CPU_N_QUERY];
    const int n_query = xkv_queries_of(w, n_head, n_gqa, head, query);
    if (n_query == 0) {
        return;
    }
    float sum  [XKV_CPU_N_QUERY][32] = {};
    float cells[64*32] = {};
    for (int64_t k = 0; k < n; k += 64) {
        const int64_t m = std::min<int64_t>(64, n - k);
        for (int64_t j = 0; j < m; ++j) {
            const char * row = (const char *) v->data + head*v->nb[1] + (k0 + k + j)*v->nb[2] + s*v->nb[3];
            xkv_cpu_to_f32(v->type, row + ggml_row_size(v->type, c0), cells + 32*j, n_channel);
        }
        for (int i = 0; i < n_query; i += 6) {
            const int     n_row = std::min(6, n_query - i);
            const float * a[6];
            float *       c[6];
            for (int r = 0; r < n_row; ++r) {
                a[r] = w.f32[query[i + r]] + k;
                c[r] = sum[i + r];
            }
            xkv_mul_32(n_row, m, a, cells, c);
        }
    }
    for (int i = 0; i < n_query; ++i) {
        float * row = (float *) ((char *) dst->data + (w.first + query[i])*dst->nb[1] + s*dst->nb[2]) + rank + c0;
        for (int64_t k = 0; k < n_channel; ++k) {
            row[k] += sum[i][k];
        }
    }
}

// The softmax is every thread's own: it is little beside the sums, and saves passes over the scores.
void xkv_cpu_gather(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &        l    = *(const xkv_cpu_layer *) userdata;
    const ggml_tensor * kq   = dst->src[0];
    const ggml_tensor * v    = dst->src[1];
    const ggml_tensor * mask = dst->src[2];

    const int64_t n_query = dst->ne[1];
    const int64_t n_slot  = l.n_frame*l.n_chunk;
    const int64_t n_kv    = v->ne[2];
    const int64_t rank    = l.rank[1];
    const int64_t n_tile  = (v->ne[0] + 31)/32;

    xkv_weights w;

    for (int64_t s = 0; s < dst->ne[2]; ++s) {
        const uint32_t *        fill     = l.fill + s*l.n_frame;
        const xkv_cpu_segment * segments = l.segments[1] + s*l.n_segment[1];

        // f(first slot, slots, window's) for runs of slots with tokens and for the window
        const auto each_block = [&](auto && f) {
            for (int64_t i = 0, n; i < l.n_frame; i += std::max<int64_t>(n, 1)) {
                n = 0;
                while (i + n < l.n_frame && fill[i + n] > 0 && (n + 1)*l.n_chunk <= XKV_CPU_BLOCK) {
                    n++;
                }
                if (n > 0) {
                    f(i*l.n_chunk, n*l.n_chunk, false);
                }
            }
            for (int64_t k = 0; k < n_kv; k += XKV_CPU_BLOCK) {
                f(n_slot + k, std::min<int64_t>(XKV_CPU_BLOCK, n_kv - k), true);
            }
        };

        int64_t n_used = 0;
        for (int64_t f = 0; f < l.n_frame; ++f) {
            n_used += fill[f] > 0 ? l.n_chunk : 0;
        }
        const int64_t  n_set  = l.plain ? l.n_head_kv : 1;
        const int64_t  n_cost = n_kv*32*2*(n_query/v->ne[1] + 6);
        const xkv_work work   = { { n_set*rank/4, v->ne[1]*n_tile }, { 4*n_used*(n_query/n_set + 4), n_cost } };

        int64_t begin[2];
        int64_t end[2];
        work.split(ith, nth, begin, end);

        bool i8 = false;
        for (int64_t i = 0; i < l.n_segment[1]; ++i) {
            i8 = i8 || xkv_cpu_is_i8(segments[i].coef.type);
        }

        for (w.first = 0; w.first < n_query; w.first += XKV_CPU_N_QUERY) {
            w.count = std::min<int64_t>(XKV_CPU_N_QUERY, n_query - w.first);

            // f(numbers, n) for what the thread sums up
            const auto each_part = [&](auto && f) {
                for (int64_t j = 0; j < w.count; ++j) {
                    float * row = (float *) ((char *) dst->data + (w.first + j)*dst->nb[1] + s*dst->nb[2]);
                    const int64_t base  = (w.first + j)%l.n_head/(l.n_head/n_set)*rank;
                    const int64_t first = std::max(4*begin[0], base);
                    const int64_t last  = std::min(4*end  [0], base + rank);
                    f(j, row + first - base, std::max<int64_t>(0, last - first));
                    for (int64_t i = begin[1]; i < end[1]; ++i) {
                        if ((w.first + j)%l.n_head/(l.n_head/l.n_head_kv) == i/n_tile) {
                            const int64_t c0 = i%n_tile*32;
                            f(j, row + rank + c0, std::min<int64_t>(32, v->ne[0] - c0));
                        }
                    }
                }
            };
            each_part([](int64_t, float * x, int64_t n) { std::fill_n(x, n, 0.0f); });

            std::fill_n(w.max, w.count, -INFINITY);
            std::fill_n(w.sum, w.count, 0.0f);
            each_block([&](int64_t s0, int64_t n, bool) {
                for (int64_t j = 0; j < w.count; ++j) {
                    xkv_logits(kq, mask, l.scale, w.first + j, s, s0, n, w.f32[0]);
                    w.max[j] = xkv_max(w.f32[0], n, w.max[j]);
                }
            });
            each_block([&](int64_t s0, int64_t n, bool window) {
                for (int64_t j = 0; j < w.count; ++j) {
                    xkv_logits(kq, mask, l.scale, w.first + j, s, s0, n, w.f32[j]);
                    w.sum[j] += (float) ggml_vec_soft_max_f32((int) n, w.f32[j], w.f32[j], w.max[j]);
                    if (i8 && !window) {
                        xkv_cpu_round_i8(w.f32[j], w.codes[j], w.scales[j], w.sums[j], n);
                    }
                }
                if (!window) {
                    xkv_gather_slots(l, segments, w, dst, s, s0, n, begin[0], end[0]);
                    return;
                }
                for (int64_t i = begin[1]; i < end[1]; ++i) {
                    xkv_gather_window(v, w, dst, l.n_head, rank, s, s0 - n_slot, n, i/n_tile, i%n_tile*32);
                }
            });
            each_part([&](int64_t j, float * x, int64_t n) {
                for (int64_t k = 0; k < n; ++k) {
                    x[k] /= w.sum[j];
                }
            });
        }
    }
}

void xkv_cpu_output(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &        l = *(const xkv_cpu_layer *) userdata;
    const ggml_tensor * o = dst->src[0];

    const int64_t n_embd_head = dst->ne[0];
    const int64_t n_head      = dst->ne[1];
    const int64_t n_tps       = dst->ne[2];
    const int64_t n_gqa       = n_head/l.n_head_kv;
    const int64_t rank        = l.rank[1];
    const int64_t n_group     = (n_embd_head + 3)/4;

    float buf[4*XKV_CPU_STRIDE];

    for (int64_t s = 0; s < dst->ne[3]; ++s) {
        const auto * segments = l.segments[1] + s*l.n_segment[1];
        for (int64_t u = n_group*l.n_head_kv*ith/nth; u < n_group*l.n_head_kv*(ith + 1)/nth; ++u) {
            const int64_t head  = u/n_group;
            const int64_t c     = u%n_group*4;
            const int     n_row = (int) std::min<int64_t>(4, n_embd_head - c);

            const auto query = [&](int64_t i) { return i/n_gqa*n_head + head*n_gqa + i%n_gqa; };
            const auto o_row = [&](int64_t i) { return (const float *) ((const char *) o->data + query(i)*o->nb[1] + s*o->nb[2]); };
            const auto d_row = [&](int64_t i) { return (float *) ((char *) dst->data + query(i)*dst->nb[1] + s*dst->nb[3]) + c; };

            for (int64_t i = 0; i < n_gqa*n_tps; ++i) {
                memcpy(d_row(i), o_row(i) + rank + c, n_row*sizeof(float));
                for (int64_t k = 0; l.plain && k < n_row; ++k) {
                    d_row(i)[k] += o_row(i)[c + k];
                }
            }
            for (int64_t d = 0, n; d < rank && !l.plain; d += n) {
                n = xkv_block_ranks(segments, l.n_segment[1], d, [](const xkv_cpu_segment &) { return true; });
                xkv_each_part(segments, l.n_segment[1], d, n, [&](const xkv_cpu_segment & seg, int64_t off, int64_t n_part, int64_t at) {
                    for (int64_t r = 0; r < 4; ++r) {
                        const int64_t channel = head*n_embd_head + std::min(c + r, n_embd_head - 1);
                        const char *  row     = seg.basis.data + channel*seg.basis.nb1 + ggml_row_size(seg.basis.type, off);
                        xkv_cpu_to_f32(seg.basis.type, row, buf + r*XKV_CPU_STRIDE + at, n_part);
                    }
                });
                xkv_add_dots(n, n_row, (const float *) buf, XKV_CPU_STRIDE, n_gqa*n_tps, [&](int64_t i) { return o_row(i) + d; }, d_row);
            }
        }
    }
}
