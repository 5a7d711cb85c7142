// XKV_ATTN on CUDA: what the kernels get. Nothing of ggml, so that they compile alone, and on the CPU through tests/shims/cuda.h.

#pragma once

#include "xkv-cu-lang.cuh"

#include <stddef.h>
#include <stdint.h>

// in the order of a chunk's segments
enum xkv_cu_type {
    XKV_CU_F32,
    XKV_CU_F16,
    XKV_CU_Q8_0,
    XKV_CU_Q5_0,
    XKV_CU_Q4_0,
    XKV_CU_Q2_0,
    XKV_CU_Q1_0,
    XKV_CU_N_TYPE,
};

enum { XKV_CU_K = 0, XKV_CU_V = 1 };

#define XKV_CU_MAX_HEAD  512
#define XKV_CU_MAX_QUERY 8   // tokens up to which queries go to the coefficients
#define XKV_CU_MAX_CHUNK 256 // tokens
#define XKV_CU_MAX_RANK  8192

// bytes of shared memory that a block of threads may have on any card
#define XKV_CU_SHARED (48 * 1024)

struct xkv_cu_segment {
    int    type;
    int    type_basis;
    int    first; // direction
    int    rank;
    size_t coef;  // bytes from a chunk's begin
    size_t basis; // bytes from the begin of a KV head's bases of this kind
};

// K or V of exact tokens
struct xkv_cu_exact {
    const char * data;
    int          type;  // F32, F16 or Q8_0
    size_t       nb[3]; // by KV head, token and stream
};

struct xkv_cu_attn {
    const char *    q;
    xkv_cu_exact    exact[2];
    const char *    mask;
    const uint8_t * coef;  // nullptr without stored tokens
    const uint8_t * basis; // nullptr when plain
    const char *    turn;  // nullptr without RoPE
    const char *    fill;
    const float *   mean;
    const float *   sinks; // nullptr: none
    float *         dst;

    size_t nb_q[3];    // by head, token and stream
    size_t nb_mask[2]; // by token and stream
    size_t nb_coef[2]; // by chunk and stream
    size_t nb_turn;    // by chunk of all streams
    size_t nb_fill[3]; // by chunk, token and stream

    float scale;
    float tolerance;
    float softcap; // 0: none

    int dim[2]; // numbers of a head
    int n_head, n_head_kv, n_gqa, n_tps, n_stream;
    int n_exact, n_frame, n_chunk, n_rot, rot_first;

    bool neox, plain, mask_f16;

    int            n_segment[2];
    xkv_cu_segment segments[2][XKV_CU_N_TYPE];
    int            rank[2]; // of a head when plain
    int            lead[2];
    size_t         head_coef[2]; // plain: bytes between KV heads in a chunk
    size_t         head_basis[2];
    size_t         kind_basis[2]; // where the bases of a kind begin

    // by kind, whether there are tiles of integers, of floats: of coefficients, of bases
    bool coef_ints[2], coef_floats[2], basis_ints[2], basis_floats[2];
};

// bytes of device memory that a run needs; n_sm: multiprocessors of the card
size_t xkv_cu_attn_scratch(const xkv_cu_attn & a, int n_sm);

void xkv_cu_attn_run(const xkv_cu_attn & a, int n_sm, void * scratch, cudaStream_t stream);
