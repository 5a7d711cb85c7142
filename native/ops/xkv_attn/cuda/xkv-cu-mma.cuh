// Products of a warp by tensor cores, and nothing else of them: 16 rows by 8 columns, sums added to.
//
// With r = lane / 4 and j = lane % 4, a lane has
//   a  rows r and r + 8      a[0] and a[1] of the first half of the depth, a[2] and a[3] of the second
//   b  column r              b[0] of the first half, b[1] of the second
//   c  rows r, r, r + 8, r + 8; columns 2j, 2j + 1, 2j, 2j + 1
// A half is 16 bytes deep, of which a register has bytes 4j to 4j + 3, or 8 numbers of f16, of which it has 2j and 2j + 1. Which
// of them are which is the same for a and b, so that any order of the depth will do.

#pragma once

#include "xkv-cu-lang.cuh"

#if defined(__CUDACC__)

static __device__ __forceinline__ void xkv_cu_mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    elif __CUDA_ARCH__ >= 750
#        pragma unroll
    for (int h = 0; h < 2; ++h) {
#        pragma unroll
        for (int i = 0; i < 2; ++i) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
                : "r"(a[2 * h + i]), "r"(b[h]));
        }
    }
#    else
    __trap(); // such cards are refused
#    endif
}

static __device__ __forceinline__ void xkv_cu_mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#    if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#    elif __CUDA_ARCH__ >= 750
#        pragma unroll
    for (int h = 0; h < 2; ++h) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * h]), "r"(a[2 * h + 1]), "r"(b[h]));
    }
#    else
    __trap();
#    endif
}

static __device__ __forceinline__ uint32_t xkv_cu_pack_half(float x, float y) {
    const half2 h = __floats2half2_rn(x, y);
    return *(const uint32_t *) &h;
}

#else

#    define xkv_cu_mma_s8  xkv_shim::mma_s8
#    define xkv_cu_mma_f16 xkv_shim::mma_f16

static inline uint32_t xkv_cu_pack_half(float x, float y) {
    return xkv_shim::to_half(x) | (uint32_t) xkv_shim::to_half(y) << 16;
}

#endif
