// Fused ops of the CPU backend for absorbed attention, as ggml_custom_op_t. The graph side gets them by name from the
// backend's registry, since the backend can be a library that is loaded at run time.

#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// largest head, in numbers
#define XKV_CPU_MAX_HEAD 512

// rows of one type in host memory
struct xkv_cpu_rows {
    const char *   data;
    enum ggml_type type;
    size_t         nb1;
};

// directions of one kind of one layer; first and rank are multiples of 32, rank also of the type's block
struct xkv_cpu_segment {
    int64_t first;
    int64_t rank;

    struct xkv_cpu_rows coef;  // K: slots of rank numbers, V: directions of n_slot numbers
    struct xkv_cpu_rows basis; // K: directions of n_embd_k numbers, V: channels of rank numbers; none when plain
};

// What the ops of one layer read beside their arguments, their userdata. A query is a token's head, queries are
// ordered by token, then by head.
struct xkv_cpu_layer {
    // K and V as they are, in one segment: a query meets the numbers of its KV head, without a basis
    bool plain;

    int64_t n_head;
    int64_t n_head_kv;
    int64_t n_chunk;
    int64_t n_frame; // chunks per stream
    int64_t rank     [2]; // of all segments; of a head when plain
    int64_t n_segment[2];

    const struct xkv_cpu_segment * segments[2]; // [n_segment] of each stream

    float            scale;  // of scores
    const float *    mean_k; // [n_embd_k]
    const uint32_t * fill;   // [n_frame] of each stream: tokens in the chunk
};

// Floats of a query that went through the basis: its coefficients as f32, then the same as bytes with a scale and a sum
// per 32, of which a segment uses what its type needs; then its score with the mean.
#define XKV_CPU_N_COEF(rank) ((rank) + (rank)/4 + (rank)/32 + (rank)/32 + 8)

// args: q in the frame of every chunk [n_embd_head, n_query, n_frame*n_stream]
// dst:  [XKV_CPU_N_COEF(rank), n_query, n_frame, n_stream] q through the basis of K (or as it is), and times the mean
void xkv_cpu_project(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// args: q [n_embd_head, n_head, n_tps, n_stream], window's K [n_embd_head, n_head_kv, n_kv, n_stream],
//       q through the basis (none without stored tokens)
// dst:  [n_slot + n_kv, n_tps, n_head, n_stream]
void xkv_cpu_scores(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// args: scores, window's V [n_embd_head, n_head_kv, n_kv, n_stream], mask [n_slot + n_kv, n_tps, 1, n_stream] (F16 or F32)
// dst:  [rank + n_embd_head, n_query, n_stream] sums of coefficients and of the window's V, weighted by the softmax
void xkv_cpu_gather(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// args: weighted sums
// dst:  [n_embd_head, n_head, n_tps, n_stream]
void xkv_cpu_output(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// one of the functions above by name, NULL for other names
void * xkv_cpu_get_proc_address(const char * name);

#ifdef __cplusplus
}
#endif
