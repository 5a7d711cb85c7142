// The language of the kernels: CUDA's own, or what tests/shims/cuda.h makes of it on the CPU.

#pragma once

#if defined(__CUDACC__)

#    include <cuda_fp16.h>
#    include <cuda_runtime.h>

#    define XKV_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#    define XKV_DYNAMIC_SHARED(name)                           extern __shared__ float4 name[]
#    define XKV_GUARD_BYTES                                    0
#    define XKV_GUARD(p)

#else

#    include "cuda.h"

#endif

#include <stddef.h>
#include <stdint.h>

// pieces of shared or device memory; on the CPU each ends in a guard zone, unless others have the same memory
struct xkv_cu_arena {
    char * at;
    bool   guarded = true;

    template <typename T> __host__ __device__ T * take(size_t n) {
        T * res = (T *) at;
        at += (n * sizeof(T) + 15) / 16 * 16;
        guard();
        return res;
    }

    __host__ __device__ void guard() {
        if (guarded) {
            XKV_GUARD(at);
            at += XKV_GUARD_BYTES;
        }
    }
};

#define XKV_CU_WARP 32
#define XKV_CU_ALL  0xffffffffu

static __device__ __forceinline__ int xkv_cu_lane() {
    return threadIdx.x % XKV_CU_WARP;
}

static __device__ __forceinline__ int xkv_cu_warp() {
    return threadIdx.x / XKV_CU_WARP;
}

static __device__ __forceinline__ int xkv_cu_n_warp() {
    return blockDim.x / XKV_CU_WARP;
}

static __device__ __forceinline__ float xkv_cu_sum(float x, int width = XKV_CU_WARP) {
    for (int i = width / 2; i > 0; i /= 2) {
        x += __shfl_xor_sync(XKV_CU_ALL, x, i);
    }
    return x;
}

static __device__ __forceinline__ float xkv_cu_max(float x) {
    for (int i = XKV_CU_WARP / 2; i > 0; i /= 2) {
        x = fmaxf(x, __shfl_xor_sync(XKV_CU_ALL, x, i));
    }
    return x;
}

static __device__ __forceinline__ int xkv_cu_max(int x) {
    for (int i = XKV_CU_WARP / 2; i > 0; i /= 2) {
        x = max(x, __shfl_xor_sync(XKV_CU_ALL, x, i));
    }
    return x;
}

// factor of sums whose max rises from one to the other
static __device__ __forceinline__ float xkv_cu_rescale(float from, float to) {
    return from == -INFINITY ? 0.0f : expf(from - to);
}
