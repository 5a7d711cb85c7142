// Decoding: exact tokens, as f32.

#include "xkv-decode.h"

static void xkv_row_f32(const ggml_tensor * t, int64_t j, int64_t head, int64_t s, float * dst) {
    const char *  p = (const char *) t->data + head * t->nb[1] + j * t->nb[2] + s * t->nb[3];
    const int64_t n = t->ne[0];
    switch (t->type) {
    case GGML_TYPE_F32:
        memcpy(dst, p, n * sizeof(float));
        break;
    case GGML_TYPE_F16: {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            xkv_store(dst + i, xkv_load_f16(p + 2 * i));
        }
        for (; i < n; ++i) {
            dst[i] = xkv_f16(p + 2 * i);
        }
        break;
    }
    default: // Q8_0
        for (int64_t c = 0; c < n / 32; ++c, p += 34) {
            const float d = xkv_f16(p);
            xkv_store(dst + 32 * c, xkv_load_i8(p + 2) * d);
            xkv_store(dst + 32 * c + 16, xkv_load_i8(p + 18) * d);
        }
        break;
    }
}

// products of x and four rows, dim a multiple of 16
static void xkv_dot_rows(int64_t dim, const float * x, const float * rows, float * res) {
    f32r acc[4] = {};
    for (int64_t c = 0; c < dim; c += 16) {
        const f32r v = xkv_load(x + c);
        for (int k = 0; k < 4; ++k) {
            acc[k] += v * xkv_load(rows + k * dim + c);
        }
    }
    xkv_sum_4(acc, res);
}

// sums [dim] += n rows, each times its factor
static void xkv_add_rows(int64_t n, int64_t dim, const float * f, const float * rows, float * sums) {
    for (int64_t c = 0; c < dim; c += 16) {
        f32r acc = xkv_load(sums + c);
        for (int64_t k = 0; k < n; ++k) {
            acc += xkv_load(rows + k * dim + c) * f[k];
        }
        xkv_store(sums + c, acc);
    }
}

// the queries of a KV head over the exact tokens [j0, j1)
void xkv_exact_span(const xkv_attn_layer & l, const xkv_decode_buffers & b, int64_t s, int64_t head, int64_t span, int64_t j0, int64_t j1) {
    const int64_t dk = l.dim[XKV_K];
    const int64_t dv = l.dim[XKV_V];

    for (int64_t t = 0; t < l.n_tps; ++t) {
        for (int64_t g = 0; g < l.n_gqa; ++g) {
            const int64_t i = t * l.n_head + head * l.n_gqa + g;
            memset(b.exact.sums(span, i), 0, dv * sizeof(float));
            b.exact.max(span, i) = -INFINITY;
            b.exact.sum(span, i) = 0.0f;
        }
    }
    for (int64_t j = j0; j < j1; j += XKV_EXACT_BLOCK) {
        const int64_t n    = std::min(XKV_EXACT_BLOCK, j1 - j);
        bool          have = false;
        for (int64_t t = 0; t < l.n_tps; ++t) {
            float bias[XKV_EXACT_BLOCK];
            bool  any = false;
            for (int64_t k = 0; k < XKV_EXACT_BLOCK; ++k) {
                bias[k] = k < n ? l.mask_at(j + k, t, s) : -INFINITY;
                any     = any || bias[k] > -INFINITY;
            }
            if (!any) {
                continue;
            }
            if (!have) {
                memset(b.row_k + n * dk, 0, (XKV_EXACT_BLOCK - n) * dk * sizeof(float));
                for (int64_t k = 0; k < n; ++k) {
                    xkv_row_f32(l.k, j + k, head, s, b.row_k + k * dk);
                    xkv_row_f32(l.v, j + k, head, s, b.row_v + k * dv);
                }
            }
            have = true;
            for (int64_t g = 0; g < l.n_gqa; ++g) {
                const int64_t i    = t * l.n_head + head * l.n_gqa + g;
                const float * q    = l.query(i, s);
                float *       sums = b.exact.sums(span, i);
                float &       max  = b.exact.max(span, i);
                float &       sum  = b.exact.sum(span, i);

                float list[XKV_EXACT_BLOCK];
                for (int64_t k = 0; k < XKV_EXACT_BLOCK; k += 4) {
                    xkv_dot_rows(dk, q, b.row_k + k * dk, list + k);
                }
                xkv_store(list, xkv_load(list) * l.par.scale);
                l.cap(list, XKV_EXACT_BLOCK);
                const f32r  score = xkv_load(list) + xkv_load(bias);
                const float m     = std::max(max, xkv_max(score));
                if (m > max) {
                    const float f = max == -INFINITY ? 0.0f : expf(max - m);
                    xkv_scale_f32(dv, f, sums);
                    sum *= f;
                    max = m;
                }
                const f32r p = xkv_exp(score - max);
                sum += xkv_sum(p);
                xkv_store(list, p);
                xkv_add_rows(n, dv, list, b.row_v, sums);
            }
        }
    }
}
