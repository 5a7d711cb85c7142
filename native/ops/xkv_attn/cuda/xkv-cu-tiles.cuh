// Tiles on CUDA (xkv-tiles.h): 16 rows by one quantization block. A warp reads the words of 16 rows side by side, which is also how
// tensor cores want them: as a of xkv-cu-mma.cuh.

#pragma once

#include "xkv-attn.cuh"

#define XKV_CU_TILE_ROWS 16

static __host__ __device__ constexpr int xkv_cu_cols(int type) {
    return type <= XKV_CU_F16 ? 16 : type <= XKV_CU_Q4_0 ? 32 : type == XKV_CU_Q2_0 ? 64 : 128;
}

static __host__ __device__ constexpr int xkv_cu_tile_bytes(int type) {
    return type == XKV_CU_F32 ? 1024 : type == XKV_CU_F16 ? 512 : type == XKV_CU_Q8_0 ? 544 : type == XKV_CU_Q5_0 ? 352 : 288;
}

// 16 rows of n_col columns
static __host__ __device__ inline size_t xkv_cu_rows_bytes(int type, int n_col) {
    return (size_t) (n_col / xkv_cu_cols(type)) * xkv_cu_tile_bytes(type);
}

static __device__ __forceinline__ float xkv_cu_half(const void * p) {
    return __half2float(*(const half *) p);
}

// at an even place
static __device__ __forceinline__ float2 xkv_cu_two_halves(const void * p) {
    struct alignas(4) two {
        half x, y;
    };
    const two h = *(const two *) p;
    return make_float2(__half2float(h.x), __half2float(h.y));
}

// byte i of a word as a number: put into the mantissa of 2^23
static __device__ __forceinline__ float xkv_cu_byte(uint32_t w, int i) {
    return __uint_as_float(__byte_perm(w, 0x4B000000u, 0x7440 + i)) - 8388608.0f;
}

// columns 4k to 4k + 3 of a row
template <int type> static __device__ __forceinline__ float4 xkv_cu_four(const uint8_t * __restrict__ tile, int row, int k) {
    if (type == XKV_CU_F32) {
        const float * p = (const float *) tile + 64 * k + row;
        return make_float4(p[0], p[16], p[32], p[48]);
    }
    if (type == XKV_CU_F16) {
        const half * p = (const half *) tile + 64 * k + row;
        return make_float4(xkv_cu_half(p), xkv_cu_half(p + 16), xkv_cu_half(p + 32), xkv_cu_half(p + 48));
    }
    const uint32_t * u = (const uint32_t *) (tile + 32) + row;
    uint32_t         w;
    float            zero;
    switch (type) {
    case XKV_CU_Q8_0:
        w    = u[16 * k];
        zero = 128.0f;
        break;
    case XKV_CU_Q5_0:
        w    = ((u[16 * (k / 2)] >> 4 * (k % 2)) & 0x0F0F0F0Fu) | ((u[64] >> k) & 0x01010101u) << 4;
        zero = 16.0f;
        break;
    case XKV_CU_Q4_0:
        w    = (u[16 * (k / 2)] >> 4 * (k % 2)) & 0x0F0F0F0Fu;
        zero = 8.0f;
        break;
    case XKV_CU_Q2_0:
        w    = (u[16 * (k / 4)] >> 2 * (k % 4)) & 0x03030303u;
        zero = 1.0f;
        break;
    default: // Q1_0, codes 0 and 2
        w    = ((u[16 * (k / 8)] >> (k % 8)) & 0x01010101u) << 1;
        zero = 1.0f;
        break;
    }
    const float d = xkv_cu_half(tile + 2 * row);
    return make_float4((xkv_cu_byte(w, 0) - zero) * d, (xkv_cu_byte(w, 1) - zero) * d, (xkv_cu_byte(w, 2) - zero) * d,
                       (xkv_cu_byte(w, 3) - zero) * d);
}

// what codes have more than the numbers they stand for; those of q8_0 come out signed
static __device__ constexpr int xkv_cu_zero(int type) {
    return type == XKV_CU_Q5_0 ? 16 : type == XKV_CU_Q4_0 ? 8 : type == XKV_CU_Q8_0 ? 0 : 1;
}

// Codes of 32 columns, the part-th of the tile. Words 2j and 2j + 1 of a row, with j = lane % 4, are the halves of the depth.
template <int type> static __device__ __forceinline__ void xkv_cu_codes(const uint8_t * __restrict__ tile, int part, uint32_t (&a)[4]) {
    const uint32_t * u = (const uint32_t *) (tile + 32) + xkv_cu_lane() / 4;
    const int        j = xkv_cu_lane() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t * w = u + 8 * i;
        if (type == XKV_CU_Q8_0) {
            a[i]     = w[32 * j] ^ 0x80808080u;
            a[i + 2] = w[32 * j + 16] ^ 0x80808080u;
        } else if (type == XKV_CU_Q5_0) {
            const uint32_t fifth = w[64] >> 2 * j;

            a[i]     = (w[16 * j] & 0x0F0F0F0Fu) | (fifth & 0x01010101u) << 4;
            a[i + 2] = (w[16 * j] >> 4 & 0x0F0F0F0Fu) | (fifth >> 1 & 0x01010101u) << 4;
        } else if (type == XKV_CU_Q4_0) {
            a[i]     = w[16 * j] & 0x0F0F0F0Fu;
            a[i + 2] = w[16 * j] >> 4 & 0x0F0F0F0Fu;
        } else if (type == XKV_CU_Q2_0) {
            const uint32_t x = w[16 * (2 * part + j / 2)] >> j % 2 * 4;

            a[i]     = x & 0x03030303u;
            a[i + 2] = x >> 2 & 0x03030303u;
        } else { // Q1_0, codes 0 and 2
            const uint32_t x = w[16 * part] >> 2 * j;

            a[i]     = (x & 0x01010101u) << 1;
            a[i + 2] = x & 0x02020202u;
        }
    }
}

// four columns from col on of a row of a matrix of n_col columns
static __device__ __forceinline__ float4 xkv_cu_four_at(int type, const uint8_t * tiles, int n_col, int row, int col) {
    const int       cols = xkv_cu_cols(type);
    const uint8_t * tile = tiles + row / 16 * xkv_cu_rows_bytes(type, n_col) + (size_t) (col / cols) * xkv_cu_tile_bytes(type);
    const int       r    = row % 16;
    const int       k    = col % cols / 4;
    switch (type) {
    case XKV_CU_F32:
        return xkv_cu_four<XKV_CU_F32>(tile, r, k);
    case XKV_CU_F16:
        return xkv_cu_four<XKV_CU_F16>(tile, r, k);
    case XKV_CU_Q8_0:
        return xkv_cu_four<XKV_CU_Q8_0>(tile, r, k);
    case XKV_CU_Q5_0:
        return xkv_cu_four<XKV_CU_Q5_0>(tile, r, k);
    case XKV_CU_Q4_0:
        return xkv_cu_four<XKV_CU_Q4_0>(tile, r, k);
    case XKV_CU_Q2_0:
        return xkv_cu_four<XKV_CU_Q2_0>(tile, r, k);
    default:
        return xkv_cu_four<XKV_CU_Q1_0>(tile, r, k);
    }
}
