// GGML_OP_XKV_ATTN: attention of one layer over exact tokens and over tokens that are stored as coefficients.
//
// The contract is the same on every device: tensors and op_params, no host pointers.
//
//   src  name   shape                                          what
//   0    q      [d_k, n_head, n_tps, n_stream]        F32      roped queries
//   1    k      [d_k, n_head_kv, n_exact, n_stream]   F32 F16 Q8_0   roped keys of the exact tokens
//   2    v      [d_v, n_head_kv, n_exact, n_stream]   F32 F16 Q8_0
//   3    mask   [n_exact, n_tps, 1, n_stream]         F32 F16  added to the exact tokens' scores
//   4    coef   [bytes of K and V, n_frame, n_stream] I8       packed coefficients of each chunk (xkv-tiles.h)
//   5    basis  [bytes]                               I8       packed bases of the layer
//   6    turn   [n_rot, 1, n_frame*n_stream]          F32      (1, 0) pairs turned to each chunk's frame
//   7    fill   [n_frame, n_tps, n_stream]            I32      tokens of each chunk that a query sees
//   8    mean   [d_k*n_head_kv]                       F32      of K in the frames of chunks
//   9    sinks  [n_head]                              F32      a logit more in each head's softmax, that no value belongs to
//   dst         [d_v, n_head, n_tps, n_stream]        F32
//
// Without stored tokens src 4 to 8 are absent; without bases (plain) src 5 is, without RoPE src 6, without sinks src 9.
//
// With tolerance 0, or more than XKV_ATTN_MAX_QUERY queries, all directions count for all tokens. Otherwise the first `lead`
// directions do, and the rest only in blocks of XKV_ATTN_FINE tokens whose share of a query's softmax exceeds the tolerance.

#pragma once

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// types of coefficients, in the order of a chunk's segments
#define XKV_ATTN_N_TYPE 7

// tokens of a batch up to which queries go to the coefficients; beyond, K and V are reconstructed
#define XKV_ATTN_MAX_QUERY 8

// most numbers and heads of a query
#define XKV_ATTN_MAX_HEAD  512
#define XKV_ATTN_MAX_HEADS 128

// tokens that are refined together
#define XKV_ATTN_FINE 16

enum xkv_attn_flag {
    XKV_ATTN_PLAIN     = 1, // K and V as they are, by KV head, without bases
    XKV_ATTN_ROPE_NEOX = 2, // pairs (i, i + n_rot/2) are turned, else (2i, 2i + 1)
};

// op_params
struct xkv_attn_params {
    float    scale;                       // of scores
    float    softcap;                     // scores become softcap*tanh(score/softcap) before the mask; 0: they stay
    float    tolerance;                   // share of the softmax beyond which a block is refined
    uint16_t n_chunk;                     // tokens of a chunk: 32, 64, 128 or 256
    uint16_t rot_first;                   // first number of a head that is turned
    uint16_t lead[2];                     // directions of K and V that count for all tokens, multiples of 32
    uint16_t rank[2][XKV_ATTN_N_TYPE];    // directions of K and V by type; of a head when plain
    uint8_t  type_basis[XKV_ATTN_N_TYPE]; // index of the bases' type, K in the low and V in the high four bits
    uint8_t  flags;
};

static inline enum ggml_type xkv_attn_type(int i) {
    static const enum ggml_type types[XKV_ATTN_N_TYPE] = {
        GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0, GGML_TYPE_Q1_0,
    };
    return types[i];
}

static inline int xkv_attn_type_index(enum ggml_type type) {
    for (int i = 0; i < XKV_ATTN_N_TYPE; ++i) {
        if (xkv_attn_type(i) == type) {
            return i;
        }
    }
    return -1;
}

// whether heads can be packed as tiles; what else a device needs is its own
static inline bool xkv_attn_fits(const struct ggml_tensor * t) {
    const struct ggml_tensor * q = t->src[0];
    return q->ne[0] % 16 == 0 && t->ne[0] % 16 == 0 && q->ne[0] <= XKV_ATTN_MAX_HEAD && t->ne[0] <= XKV_ATTN_MAX_HEAD &&
           q->ne[1] <= XKV_ATTN_MAX_HEADS;
}

struct xkv_attn_src {
    struct ggml_tensor * q;
    struct ggml_tensor * k;
    struct ggml_tensor * v;
    struct ggml_tensor * mask;
    struct ggml_tensor * coef;
    struct ggml_tensor * basis;
    struct ggml_tensor * turn;
    struct ggml_tensor * fill;
    struct ggml_tensor * mean;
    struct ggml_tensor * sinks;
};

struct ggml_tensor * xkv_attn(struct ggml_context * ctx, struct xkv_attn_src src, const struct xkv_attn_params * params);

#ifdef __cplusplus
}
#endif
