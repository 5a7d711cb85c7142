// The language of the kernels: Metal's own, or what tests/shims/metal makes of it on the CPU. The Metal compiler takes numbers for
// finite (fast math), so nothing here is infinite: XKV_MTL_NONE is the score of what is not seen.

#pragma once

#include <metal_stdlib>

using namespace metal;

#if defined(__METAL_VERSION__)
#    define XKV_MTL_AT(x)             [[x]]
#    define XKV_MTL_CONSTANT(name, i) constant int name [[function_constant(XKV_MTL_FC + i)]];
#    define XKV_MTL_UNROLL            _Pragma("clang loop unroll(full)")
#    define XKV_GUARD_BYTES           0
#    define XKV_GUARD(p)
#    define XKV_MTL_SIMD_ORDER() simdgroup_barrier(mem_flags::mem_threadgroup)
#endif

// XKV_MTL_SIMD_ORDER: a barrier before a write whose place others of the SIMD group have read. Operations on matrices stand between,
// so that the shim cannot miss it; Metal promises no such order.

#include "xkv-mtl-args.h"

XKV_MTL_CONSTANT(fc_dim_k, XKV_MTL_FC_DIM_K)
XKV_MTL_CONSTANT(fc_dim_v, XKV_MTL_FC_DIM_V)
XKV_MTL_CONSTANT(fc_n_gqa, XKV_MTL_FC_N_GQA)
XKV_MTL_CONSTANT(fc_n_chunk, XKV_MTL_FC_N_CHUNK)
XKV_MTL_CONSTANT(fc_exact_k, XKV_MTL_FC_EXACT_K)
XKV_MTL_CONSTANT(fc_exact_v, XKV_MTL_FC_EXACT_V)
XKV_MTL_CONSTANT(fc_mask_f16, XKV_MTL_FC_MASK_F16)
XKV_MTL_CONSTANT(fc_plain, XKV_MTL_FC_PLAIN)
XKV_MTL_CONSTANT(fc_neox, XKV_MTL_FC_NEOX)

#define XKV_MTL_NONE (-1.0e38f)

// what all kernels get; sources that an op lacks are bound to q and not read
#define XKV_MTL_PARAMS                                                                                                                     \
    constant xkv_mtl_args &a XKV_MTL_AT(buffer(0)), constant xkv_mtl_step &step XKV_MTL_AT(buffer(1)),                                     \
        device const char *q XKV_MTL_AT(buffer(2)), device const char *k XKV_MTL_AT(buffer(3)),                                            \
        device const char *v XKV_MTL_AT(buffer(4)), device const char *mask XKV_MTL_AT(buffer(5)),                                         \
        device const uchar *coef XKV_MTL_AT(buffer(6)), device const uchar *basis XKV_MTL_AT(buffer(7)),                                   \
        device const char *turn XKV_MTL_AT(buffer(8)), device const char *fill XKV_MTL_AT(buffer(9)),                                      \
        device const float *mean XKV_MTL_AT(buffer(10)), device const float *sinks XKV_MTL_AT(buffer(11)),                                 \
        device float *dst XKV_MTL_AT(buffer(12)), device char *scratch XKV_MTL_AT(buffer(13)),                                             \
        threadgroup char *shared XKV_MTL_AT(threadgroup(0)), uint3 block XKV_MTL_AT(threadgroup_position_in_grid),                         \
        ushort lane XKV_MTL_AT(thread_index_in_simdgroup), ushort warp XKV_MTL_AT(simdgroup_index_in_threadgroup)

struct xkv_mtl_in {
    constant xkv_mtl_args * a;
    constant xkv_mtl_step * step;

    device const char *  q;
    device const char *  exact[2];
    device const char *  mask;
    device const uchar * coef;
    device const uchar * basis;
    device const char *  turn;
    device const char *  fill;
    device const float * mean;
    device const float * sinks;
    device float *       dst;
    device char *        scratch;
    threadgroup char *   shared;

    int block[3];
    int lane, warp, thread_index;
};

#define XKV_MTL_IN                                                                                                                         \
    xkv_mtl_in {                                                                                                                           \
        &a, &step, q, { k, v }, mask, coef, basis, turn, fill, mean, sinks, dst, scratch, shared,                                          \
            { (int) block[0], (int) block[1], (int) block[2] }, (int) lane, (int) warp, (int) warp * XKV_MTL_WARP + (int) lane             \
    }

// a piece of threadgroup memory that begins at a place of a layout
template <typename T> static inline threadgroup T * xkv_mtl_piece(thread const xkv_mtl_in & in, int at, int n) {
    XKV_GUARD(in.shared + at + (n * (int) sizeof(T) + 15) / 16 * 16);
    return (threadgroup T *) (in.shared + at);
}

// and of scratch memory
template <typename T> static inline device T * xkv_mtl_scratch(thread const xkv_mtl_in & in, uint64_t at) {
    return (device T *) (in.scratch + at);
}

// whether any thread of the group says so; `any` has room for each SIMD group
static inline bool xkv_mtl_any(bool x, thread const xkv_mtl_in & in, threadgroup int * any, int n_warp) {
    const bool some = simd_any(x);
    if (in.lane == 0) {
        any[in.warp] = some ? 1 : 0;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int res = 0;
    for (int i = 0; i < n_warp; ++i) {
        res |= any[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    return res != 0;
}

// sum of the lane's group of XKV_MTL_FINE
static inline float xkv_mtl_sum_fine(float x) {
    for (ushort i = XKV_MTL_FINE / 2; i > 0; i /= 2) {
        x += simd_shuffle_xor(x, i);
    }
    return x;
}

static inline bool xkv_mtl_seen(float score) {
    return score > 0.5f * XKV_MTL_NONE;
}

// factor of sums whose max rises from one to the other
static inline float xkv_mtl_rescale(float from, float to) {
    return xkv_mtl_seen(from) ? exp(from - to) : 0.0f;
}

static inline float xkv_mtl_cap(float score, float cap) {
    return cap > 0.0f ? cap * precise::tanh(score / cap) : score;
}
