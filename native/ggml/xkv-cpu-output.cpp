// Output of stored tokens and window: weights times the coefficients of V and the cells, then through the basis.

#include "xkv-cpu-kernels.h"

// weights of up to 32 queries for the slots of a block
struct xkv_weights {
    const float * f32   [32];
    int8_t        codes [32][XKV_CPU_BLOCK];
    float         scales[32][XKV_CPU_BLOCK/32];
    float         sums  [32][XKV_CPU_BLOCK/32];
};

// weighted sums of directions 4*i0 .. 4*i1 - 1 over n slots from s0 on, of queries q0 .. q0 + n_q - 1
static void xkv_gather_slots(const xkv_cpu_segment * seg, const xkv_weights & w, ggml_tensor * dst, int64_t s, int64_t s0, int64_t n,
                             int64_t i0, int64_t i1, int64_t q0, int64_t n_q) {
    float  buf    [4*XKV_CPU_STRIDE];
    int8_t codes  [4*XKV_CPU_STRIDE];
    float  scales [4*XKV_CPU_STRIDE/32];
    float  offsets[4*XKV_CPU_STRIDE/32];

    for (int64_t i = i0; i < i1; ++i) {
        while (seg->first + seg->rank <= 4*i) {
            seg++;
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
        const auto to = [&](int64_t j) { return (float *) ((char *) dst->data + (q0 + j)*dst->nb[1] + s*dst->nb[2]) + 4*i; };
        if (i8) {
            const xkv_i8 x = { codes, scales, seg->coef.type == GGML_TYPE_Q8_0 ? nullptr : offsets };
            xkv_add_dots(n, 4, x, XKV_CPU_STRIDE, n_q, [&](int64_t j) { return xkv_i8{ w.codes[j], w.scales[j], w.sums[j] }; }, to);
        } else {
            xkv_add_dots(n, 4, (const float *) buf, XKV_CPU_STRIDE, n_q, [&](int64_t j) { return w.f32[j]; }, to);
        }
    }
}

// up to 32 channels of a KV head from c0 on, over the window's cells
static void xkv_gather_window(const ggml_tensor * p, const ggml_tensor * v, ggml_tensor * dst, int64_t n_slot, int64_t rank, int64_t s,
                              int64_t head, int64_t c0) {
    const int64_t n_tps     = p->ne[1];
    const int64_t n_head    = p->ne[2];
    const int64_t n_kv      = v->ne[2];
    const int64_t n_gqa     = n_head/v->ne[1];
    const int64_t n_channel = std::min<int64_t>(32, v->ne[0] - c0);

    float cells[64*32];
    if (n_channel < 32) {
        memset(cells, 0, sizeof(cells));
    }
    for (int64_t i0 = 0; i0 < n_gqa*n_tps; i0 += 6) {
        const int m = (int) std::min<int64_t>(6, n_gqa*n_tps - i0);

        const float * a[6];
        float *       c[6];
        float         sum[6][32] = {};
        for (int i = 0; i < m; ++i) {
            const int64_t h = head*n_gqa + (i0 + i)%n_gqa;
            const int64_t t = (i0 + i)/n_gqa;
            a[i] = (const float *) ((const char *) p->data + h*p->nb[2] + t*p->nb[1] + s*p->nb[3]) + n_slot;
            c[i] = sum[i];
        }
        for (int64_t k = 0; k < n_kv; k += 64) {
            const int64_t n = std::min<int64_t>(64, n_kv - k);
            for (int64_t j = 0; j < n; ++j) {
                const char * row = (const char *) v->data + head*v->nb[1] + (k + j)*v->nb[2] + s*v->nb[3];
                xkv_cpu_to_f32(v->type, row + ggml_row_size(v->type, c0), cells + 32*j, n_channel);
            }
            xkv_mul_32(m, n, a, cells, c);
            for (int i = 0; i < m; ++i) {
                a[i] += n;
            }
        }
        for (int i = 0; i < m; ++i) {
            const int64_t iq = (i0 + i)/n_gqa*n_head + head*n_gqa + (i0 + i)%n_gqa;
            memcpy((float *) ((char *) dst->data + iq*dst->nb[1] + s*dst->nb[2]) + rank + c0, sum[i], n_channel*sizeof(float));
        }
    }
}

void xkv_cpu_gather(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto &        l = *(const xkv_cpu_layer *) userdata;
    const ggml_tensor * p = dst->src[0];
    const ggml_tensor * v = dst->src[1];

    const int64_t n_query = dst->ne[1];
    const int64_t n_slot  = l.n_frame*l.n_chunk;
    const int64_t rank    = l.rank[1];
    const int64_t n_tile  = (v->ne[0] + 31)/32;

    xkv_weights w;

    for (int64_t s = 0; s < dst->ne[2]; ++s) {
        const uint32_t *        fill     = l.fill + s*l.n_frame;
        const xkv_cpu_segment * segments = l.segments[1] + s*l.n_segment[1];

        int64_t n_used = 0;
        for (int64_t f = 0; f < l.n_frame; ++f) {
            n_used += fill[f] > 0 ? l.n_chunk : 0;
        }
        const int64_t  n_cost = v->ne[2]*32*2*(n_query/v->ne[1] + 6);
        const xkv_work work   = { { rank/4, v->ne[1]*n_tile }, { 4*n_used*(n_query + 4), n_cost } };

        int64_t begin[2];
        int64_t end[2];
        work.split(ith, nth, begin, end);

        for (int64_t i = 0; i < n_query; ++i) {
            float * row = (float *) ((char *) dst->data + i*dst->nb[1] + s*dst->nb[2]);
            std::fill_n(row + 4*begin[0], 4*(end[0] - begin[0]), 0.0f);
        }
        bool i8 = false;
        for (int64_t i = 0; i < l.n_segment[1]; ++i) {
            i8 = i8 || xkv_cpu_is_i8(segments[i].coef.type);
        }

        // slots block by block, so that their weights stay in the cache for all directions
        for (int64_t f = 0; f < l.n_frame;) {
            int64_t n = 0;
            while (f + n < l.n_frame && fill[f + n] > 0 && (n + 1)*l.n_chunk <= XKV_CPU_BLOCK) {
                n++;
            }
            for (int64_t q0 = 0; n > 0 && begin[0] < end[0] && q0 < n_query; q0 += 32) {
                const int64_t n_q = std::min<int64_t>(32, n_query - q0);
                for (int64_t j = 0; j < n_q; ++j) {
                    const int64_t i = q0 + j;
                    w.f32[j] = (const float *) ((const char *) p->data + i%l.n_head*p->nb[2] + i/l.n_head*p->nb[1] + s*p->nb[3]) + f*l.n_chunk;
                    if (i8) {
                        xkv_cpu_round_i8(w.f32[j], w.codes[j], w.scales[j], w.sums[j], n*l.n_chunk);
                    }
                }
                xkv_gather_slots(segments, w, dst, s, f*l.n_chunk, n*l.n_chunk, begin[0], end[0], q0, n_q);
            }
            f += std::max<int64_t>(n, 1);
        }
        for (int64_t i = begin[1]; i < end[1]; ++i) {
            xkv_gather_window(p, v, dst, n_slot, rank, s, i/n_tile, i%n_tile*32);
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
            }
            for (int64_t d = 0, n; d < rank; d += n) {
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
