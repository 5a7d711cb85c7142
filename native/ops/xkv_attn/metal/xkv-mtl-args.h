// XKV_ATTN on Metal: what the kernels get, and how memory is laid out. Read by the Metal compiler and by C++: plain structs, nothing
// of ggml, offsets instead of pointers.

#pragma once

#if defined(__METAL_VERSION__)
#    define XKV_THREAD thread
#else
#    include <stdint.h>
#    define XKV_THREAD
#endif

// on the CPU each piece of memory ends in a guard zone, see tests/shims
#ifndef XKV_GUARD_BYTES
#    define XKV_GUARD_BYTES 0
#endif

// in the order of a chunk's segments
#define XKV_MTL_F32    0
#define XKV_MTL_F16    1
#define XKV_MTL_Q8_0   2
#define XKV_MTL_Q5_0   3
#define XKV_MTL_Q4_0   4
#define XKV_MTL_Q2_0   5
#define XKV_MTL_Q1_0   6
#define XKV_MTL_N_TYPE 7

#define XKV_MTL_K 0
#define XKV_MTL_V 1

#define XKV_MTL_MAX_HEAD  512
#define XKV_MTL_MAX_QUERY 8   // tokens up to which queries go to the coefficients
#define XKV_MTL_MAX_CHUNK 256 // tokens
#define XKV_MTL_MAX_RANK  7168

#define XKV_MTL_SHARED (32 * 1024) // bytes of threadgroup memory on any Apple GPU
#define XKV_MTL_WARP   32          // threads of a SIMD group

// few queries
#define XKV_MTL_THREADS       256
#define XKV_MTL_VECS          8   // queries that a SIMD group multiplies with a tile at a time
#define XKV_MTL_TILE          32  // most queries of a threadgroup
#define XKV_MTL_SLICE         128 // directions that queries are projected to at a time
#define XKV_MTL_FINE          16  // tokens that are refined together
#define XKV_MTL_EXACT_THREADS 128
#define XKV_MTL_EXACT_BLOCK   32 // tokens, one for each lane

// many queries
#define XKV_MTL_BATCH        512 // tokens whose K and V are made at a time
#define XKV_MTL_ROWS         32  // queries, or tokens, of a threadgroup
#define XKV_MTL_SPAN         128 // tokens whose scores a threadgroup has at a time
#define XKV_MTL_DEPTH        32  // numbers of a panel that are summed at a time
#define XKV_MTL_COLS         64  // numbers of a head that are made at a time
#define XKV_MTL_MAKE_THREADS 128
#define XKV_MTL_LD_PANEL     (XKV_MTL_DEPTH + 4)
#define XKV_MTL_LD_COLS      (XKV_MTL_COLS + 4)
#define XKV_MTL_LD_SPAN      (XKV_MTL_SPAN + 4)
#define XKV_MTL_PART         16 // rows and columns of a product that a SIMD group has at a time
#define XKV_MTL_LD_PART      (XKV_MTL_PART + 4)

// buffers of a kernel; sources in the order of the op's
#define XKV_MTL_BUFFER_ARGS    0
#define XKV_MTL_BUFFER_STEP    1
#define XKV_MTL_BUFFER_SRC     2
#define XKV_MTL_BUFFER_DST     12
#define XKV_MTL_BUFFER_SCRATCH 13

// function constants: what divides and bounds loops
#define XKV_MTL_FC          0
#define XKV_MTL_FC_DIM_K    0
#define XKV_MTL_FC_DIM_V    1
#define XKV_MTL_FC_N_GQA    2
#define XKV_MTL_FC_N_CHUNK  3
#define XKV_MTL_FC_EXACT_K  4 // types of exact tokens
#define XKV_MTL_FC_EXACT_V  5
#define XKV_MTL_FC_MASK_F16 6
#define XKV_MTL_FC_PLAIN    7
#define XKV_MTL_FC_NEOX     8
#define XKV_MTL_N_FC        9

struct xkv_mtl_segment {
    int32_t  type;
    int32_t  type_basis;
    int32_t  first; // direction
    int32_t  rank;
    uint64_t coef;  // bytes from a chunk's begin
    uint64_t basis; // bytes from the begin of a KV head's bases of this kind
};

struct xkv_mtl_args {
    uint64_t nb_q[3];        // by head, token and stream
    uint64_t nb_exact[2][3]; // K and V of exact tokens by KV head, token and stream
    uint64_t nb_mask[2];     // by token and stream
    uint64_t nb_coef[2];     // by chunk and stream
    uint64_t nb_turn;        // by chunk of all streams
    uint64_t nb_fill[3];     // by chunk, token and stream

    float scale;
    float tolerance;
    float softcap; // 0: none

    int32_t n_head, n_head_kv, n_tps, n_stream;
    int32_t n_exact, n_frame, n_rot, rot_first;
    int32_t has_sinks;

    int32_t         n_segment[2];
    int32_t         rank[2]; // of a head when plain
    int32_t         lead[2];
    xkv_mtl_segment segments[2][XKV_MTL_N_TYPE];
    uint64_t        head_coef[2]; // plain: bytes between KV heads in a chunk
    uint64_t        head_basis[2];
    uint64_t        kind_basis[2]; // where the bases of a kind begin

    // few queries; in scratch memory, bytes from its begin
    int32_t  n_query, n_split, n_span; // n_span: of exact tokens
    int32_t  pad;
    uint64_t at_sums;        // [stream][split][query][rank] of V, weighted by exp(score - max)
    uint64_t at_state;       // float4 [stream][split][query] max, sum of weights, 1 if the sums hold more than the lead
    uint64_t at_exact;       // [stream][span][query][d_v]
    uint64_t at_exact_state; // float2 [stream][span][query]
    uint64_t at_share;       // [stream][query][block of tokens] log of its sum of weights by the lead; XKV_MTL_NONE once refined
    uint64_t at_least; // float2 [stream][query] log of the sum of weights beyond which a block is refined: the least so far, this round's

    // many queries
    uint64_t at_k;     // [KV head][XKV_MTL_BATCH][d_k]
    uint64_t at_v;     // [KV head][XKV_MTL_BATCH][d_v]
    uint64_t at_total; // float2 [query] max and sum of weights
};

// what differs from launch to launch
struct xkv_mtl_step {
    int32_t n;      // most queries of a threadgroup, or exact tokens of a span
    int32_t round;  // of the refinement
    int32_t stream; // many queries: one at a time
    int32_t first;  // of the batch's tokens
    int32_t n_token;
    int32_t stored; // whether the batch is of stored tokens
};

// takes n pieces of so many bytes; `at` is the end of what is taken
static inline int32_t xkv_mtl_take(XKV_THREAD int32_t & at, int32_t n, int32_t size) {
    const int32_t res = at;
    at += (n * size + 15) / 16 * 16 + XKV_GUARD_BYTES;
    return res;
}

// threadgroup memory for n queries and a chunk
struct xkv_mtl_chunk_layout {
    int32_t q;     // [n][d_k] in the chunk's frame, times the scale
    int32_t y;     // [n][XKV_MTL_SLICE] through the basis of K
    int32_t score; // [n][n_chunk], then weights
    int32_t rough; // [n][n_chunk] of the refinement: by the lead
    int32_t max;   // of each query, as are the rest
    int32_t sum;
    int32_t factor; // of the sums so far
    int32_t have;   // what the sums hold: 0 nothing, 1 the lead, 2 all
    int32_t held;   // and held before this chunk
    int32_t fill;
    int32_t fine; // blocks of the chunk that count
    int32_t any;  // of each SIMD group
    int32_t size;
};

static inline xkv_mtl_chunk_layout xkv_mtl_lay_out_chunk(int32_t n, int32_t dim_k, int32_t n_chunk, bool refine) {
    xkv_mtl_chunk_layout l;
    int32_t              at = 0;

    l.q      = xkv_mtl_take(at, n * dim_k, 4);
    l.y      = xkv_mtl_take(at, n * XKV_MTL_SLICE, 4);
    l.score  = xkv_mtl_take(at, n * n_chunk, 4);
    l.rough  = xkv_mtl_take(at, refine ? n * n_chunk : 0, 4);
    l.max    = xkv_mtl_take(at, n, 4);
    l.sum    = xkv_mtl_take(at, n, 4);
    l.factor = xkv_mtl_take(at, n, 4);
    l.have   = xkv_mtl_take(at, n, 4);
    l.held   = xkv_mtl_take(at, n, 4);
    l.fill   = xkv_mtl_take(at, n, 4);
    l.fine   = xkv_mtl_take(at, n, 4);
    l.any    = xkv_mtl_take(at, XKV_MTL_THREADS / XKV_MTL_WARP, 4);
    l.size   = at;
    return l;
}

// for exact tokens and few queries
struct xkv_mtl_exact_layout {
    int32_t q;     // [vectors][d_k]
    int32_t score; // [vectors][tokens], then weights
    int32_t max;
    int32_t sum;
    int32_t factor;
    int32_t any;
    int32_t size;
};

static inline xkv_mtl_exact_layout xkv_mtl_lay_out_exact(int32_t dim_k) {
    xkv_mtl_exact_layout l;
    int32_t              at = 0;

    l.q      = xkv_mtl_take(at, XKV_MTL_VECS * dim_k, 4);
    l.score  = xkv_mtl_take(at, XKV_MTL_VECS * XKV_MTL_EXACT_BLOCK, 4);
    l.max    = xkv_mtl_take(at, XKV_MTL_VECS, 4);
    l.sum    = xkv_mtl_take(at, XKV_MTL_VECS, 4);
    l.factor = xkv_mtl_take(at, XKV_MTL_VECS, 4);
    l.any    = xkv_mtl_take(at, XKV_MTL_EXACT_THREADS / XKV_MTL_WARP, 4);
    l.size   = at;
    return l;
}

struct xkv_mtl_merge_layout {
    int32_t z; // [rank] of V
    int32_t o; // [d_v]
    int32_t size;
};

static inline xkv_mtl_merge_layout xkv_mtl_lay_out_merge(int32_t rank, int32_t dim_v) {
    xkv_mtl_merge_layout l;
    int32_t              at = 0;

    l.z    = xkv_mtl_take(at, rank, 4);
    l.o    = xkv_mtl_take(at, dim_v, 4);
    l.size = at;
    return l;
}

// K and V of stored tokens
struct xkv_mtl_make_layout {
    int32_t a; // [XKV_MTL_ROWS tokens][XKV_MTL_DEPTH directions]
    int32_t b; // [XKV_MTL_DEPTH directions][XKV_MTL_COLS numbers]
    int32_t any;
    int32_t size;
};

static inline xkv_mtl_make_layout xkv_mtl_lay_out_make() {
    xkv_mtl_make_layout l;
    int32_t             at = 0;

    l.a    = xkv_mtl_take(at, XKV_MTL_ROWS * XKV_MTL_LD_PANEL, 4);
    l.b    = xkv_mtl_take(at, XKV_MTL_DEPTH * XKV_MTL_LD_COLS, 4);
    l.any  = xkv_mtl_take(at, XKV_MTL_MAKE_THREADS / XKV_MTL_WARP, 4);
    l.size = at;
    return l;
}

// many queries and a batch
struct xkv_mtl_attend_layout {
    int32_t score; // [rows][XKV_MTL_SPAN], then weights
    int32_t panel; // of queries, [rows][XKV_MTL_DEPTH]
    int32_t part;  // of each SIMD group, [XKV_MTL_PART][XKV_MTL_PART] of weights times V
    int32_t max;   // of each row, as are the rest
    int32_t sum;
    int32_t factor; // of the sums so far
    int32_t any;
    int32_t size;
};

static inline xkv_mtl_attend_layout xkv_mtl_lay_out_attend() {
    xkv_mtl_attend_layout l;
    int32_t               at = 0;

    l.score  = xkv_mtl_take(at, XKV_MTL_ROWS * XKV_MTL_LD_SPAN, 4);
    l.panel  = xkv_mtl_take(at, XKV_MTL_ROWS * XKV_MTL_LD_PANEL, 4);
    l.part   = xkv_mtl_take(at, XKV_MTL_THREADS / XKV_MTL_WARP * XKV_MTL_PART * XKV_MTL_LD_PART, 4);
    l.max    = xkv_mtl_take(at, XKV_MTL_ROWS, 4);
    l.sum    = xkv_mtl_take(at, XKV_MTL_ROWS, 4);
    l.factor = xkv_mtl_take(at, XKV_MTL_ROWS, 4);
    l.any    = xkv_mtl_take(at, XKV_MTL_THREADS / XKV_MTL_WARP, 4);
    l.size   = at;
    return l;
}
