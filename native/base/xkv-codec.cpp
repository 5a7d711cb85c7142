#include "base/xkv-codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

uint32_t xkv_block_size(ggml_type type) {
    return ggml_blck_size(type);
}

// Upstream's own quantizer to q2_0 uses three of its four levels {-1, 0, 1, 2}*d. Here d (of either sign, so that the
// long side of the levels lies where the block has its largest number) comes from least squares.
static void xkv_encode_q2_0(const float * x, void * dst, size_t n) {
    static const size_t QK = 64;

    uint8_t * out = (uint8_t *) dst;
    for (size_t ib = 0; ib < n / QK; ++ib, x += QK, out += 2 + QK / 4) {
        float lo = 0.0f;
        float hi = 0.0f;
        float ss = 0.0f;
        for (size_t i = 0; i < QK; ++i) {
            lo = std::min(lo, x[i]);
            hi = std::max(hi, x[i]);
            ss += x[i] * x[i];
        }
        float d = 0.95f * sqrtf(ss / QK) * (hi >= -lo ? 1.0f : -1.0f); // near the best for a Gaussian

        float code[QK];
        for (int iter = 0; iter < 3; ++iter) {
            const float id  = d != 0.0f ? 1.0f / d : 0.0f;
            float       sxc = 0.0f;
            float       scc = 0.0f;
            for (size_t i = 0; i < QK; ++i) {
                code[i] = std::min(2.0f, std::max(-1.0f, rintf(x[i] * id)));
                sxc += x[i] * code[i];
                scc += code[i] * code[i];
            }
            d = scc > 0.0f ? sxc / scc : 0.0f;
        }
        const ggml_fp16_t half = ggml_fp32_to_fp16(d);
        memcpy(out, &half, sizeof(half));
        for (size_t i = 0; i < QK / 4; ++i) {
            uint8_t byte = 0;
            for (int k = 0; k < 4; ++k) {
                byte |= (uint8_t) ((int) code[4 * i + k] + 1) << 2 * k;
            }
            out[2 + i] = byte;
        }
    }
}

void xkv_encode(ggml_type type, const float * x, void * dst, size_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, x, n * sizeof(float));
    } else if (type == GGML_TYPE_Q2_0) {
        xkv_encode_q2_0(x, dst, n);
    } else {
        ggml_get_type_traits(type)->from_float_ref(x, dst, n);
    }
}

void xkv_decode(ggml_type type, const void * src, float * x, size_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(x, src, n * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, x, n);
    }
}
