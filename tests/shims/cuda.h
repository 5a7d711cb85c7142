// As much of CUDA as our kernels need, on the CPU (blocks.h).

#pragma once

#include "cuda_mma.h"

#include <cmath>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
    float x, y;
};

struct alignas(8) uint2 {
    unsigned x, y;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

static inline float2 make_float2(float x, float y) {
    return { x, y };
}

static inline float4 make_float4(float x, float y, float z, float w) {
    return { x, y, z, w };
}

typedef void * cudaStream_t;

struct half {
    uint16_t bits;
};

#define XKV_LAUNCH(kernel, grid, block, smem, stream, ...)                                                                                 \
    xkv_shim::launch(#kernel, grid, block, smem, [&] { kernel(__VA_ARGS__); });                                                            \
    (void) (stream)
#define XKV_DYNAMIC_SHARED(name) float4 * name = (float4 *) xkv_shim::shared_memory()
#define XKV_GUARD_BYTES          xkv_shim::guard_bytes
#define XKV_GUARD(p)             xkv_shim::guard(p)

#define threadIdx (xkv_shim::thread_index())
#define blockIdx  (xkv_shim::block_index())
#define blockDim  (xkv_shim::get().threads)
#define gridDim   (xkv_shim::get().grid)

#define XKV_SHIM_TEXT_(x) #x
#define XKV_SHIM_TEXT(x)  XKV_SHIM_TEXT_(x)
#define XKV_SHIM_NAME     __FILE__ ":" XKV_SHIM_TEXT(__LINE__)
#define XKV_SHIM_PLACE                                                                                                                     \
    [] {                                                                                                                                   \
        constexpr int place = xkv_shim::place(__FILE__, __LINE__);                                                                         \
        return place;                                                                                                                      \
    }()

// places below 0: operations of a warp
#define __syncthreads()              xkv_shim::barrier(XKV_SHIM_PLACE, XKV_SHIM_NAME)
#define __syncthreads_or(x)          xkv_shim::barrier_or(x, XKV_SHIM_PLACE, XKV_SHIM_NAME)
#define __syncwarp()                 ((void) xkv_shim::ballot(false, -1))
#define __shfl_sync(mask, x, l)      xkv_shim::shuffle(x, l, -2)
#define __shfl_xor_sync(mask, x, l)  xkv_shim::shuffle(x, xkv_shim::lane() ^ (l), -3)
#define __shfl_down_sync(mask, x, l) xkv_shim::shuffle(x, std::min(xkv_shim::lane() + (l), 31), -4)
#define __shfl_up_sync(mask, x, l)   xkv_shim::shuffle(x, std::max(xkv_shim::lane() - (l), 0), -5)
#define __ballot_sync(mask, x)       xkv_shim::ballot(x, -6)
#define __any_sync(mask, x)          (xkv_shim::ballot(x, -7) != 0)
#define __all_sync(mask, x)          (xkv_shim::ballot(!(x), -8) == 0)

using std::max;
using std::min;

static inline float __half2float(half h) {
    return xkv_shim::from_half(h.bits);
}

static inline half __float2half(float x) {
    return { xkv_shim::to_half(x) };
}

static inline float __uint_as_float(uint32_t x) {
    float res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

static inline uint32_t __float_as_uint(float x) {
    uint32_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

static inline int __float_as_int(float x) {
    return (int) __float_as_uint(x);
}

static inline float __int_as_float(int x) {
    return __uint_as_float((uint32_t) x);
}

static inline int __float2int_rn(float x) {
    const int off = xkv_shim::struck() ? xkv_shim::get().planted.code : 0;
    return x == x ? (int) std::nearbyint(std::min(std::max(x, -2e9f), 2e9f)) + off : 0;
}

static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
    const uint64_t all = (uint64_t) y << 32 | x;
    uint32_t       res = 0;
    for (int i = 0; i < 4; ++i) {
        res |= (uint32_t) ((all >> 8 * ((s >> 4 * i) & 7)) & 255) << 8 * i;
    }
    return res;
}

static inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

static inline int __ffs(int x) {
    return __builtin_ffs(x);
}

static inline int __dp4a(int x, int y, int sum) {
    for (int i = 0; i < 4; ++i) {
        sum += (int) (int8_t) (x >> 8 * i) * (int) (int8_t) (y >> 8 * i);
    }
    return sum + (xkv_shim::struck() ? xkv_shim::get().planted.dot : 0);
}

template <typename T> static inline T atomicAdd(T * p, T x) {
    const T old = *p;
    *p          = old + x;
    return old;
}

template <typename T> static inline T atomicMax(T * p, T x) {
    const T old = *p;
    *p          = std::max(old, x);
    return old;
}
