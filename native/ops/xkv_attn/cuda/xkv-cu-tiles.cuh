// Tiles on CUDA (xkv-tiles.h): 16 rows by one quantization block. A warp reads the words of 16 rows side by side.

#pragma once

#include "xkv-attn.cuh"

// vectors that a warp multiplies with a tile at a time
#define XKV_CU_VECS 8

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

template <int type>
static __device__ __forceinline__ void xkv_cu_dot_type(const uint8_t * __restrict__ tiles, int n_col, const float * y, int ldy,
                                                       uint32_t mask, float (&acc)[XKV_CU_VECS]) {
    constexpr int cols = xkv_cu_cols(type);

    const int row = xkv_cu_lane() % 16;
    const int odd = xkv_cu_lane() / 16;
    for (int c = 0; c < n_col; c += cols, tiles += xkv_cu_tile_bytes(type)) {
#pragma unroll 4
        for (int j = 0; j < cols / 8; ++j) {
            const int     k = 2 * j + odd;
            const float4  x = xkv_cu_four<type>(tiles, row, k);
            const float * v = y + c + 4 * k;
#pragma unroll
            for (int i = 0; i < XKV_CU_VECS; ++i) {
                if (mask >> i & 1) {
                    const float4 z = *(const float4 *) (v + i * ldy);
                    acc[i] += x.x * z.x;
                    acc[i] += x.y * z.y;
                    acc[i] += x.z * z.z;
                    acc[i] += x.w * z.w;
                }
            }
        }
    }
}

// By a warp: adds the products of 16 rows, whose n_col columns are in tiles that follow each other, and the vectors y in mask. The
// two lanes of a row have half of the sum each, see xkv_cu_both.
static __device__ __forceinline__ void xkv_cu_dot(int type, const uint8_t * tiles, int n_col, const float * y, int ldy, uint32_t mask,
                                                  float (&acc)[XKV_CU_VECS]) {
    switch (type) {
    case XKV_CU_F32:
        return xkv_cu_dot_type<XKV_CU_F32>(tiles, n_col, y, ldy, mask, acc);
    case XKV_CU_F16:
        return xkv_cu_dot_type<XKV_CU_F16>(tiles, n_col, y, ldy, mask, acc);
    case XKV_CU_Q8_0:
        return xkv_cu_dot_type<XKV_CU_Q8_0>(tiles, n_col, y, ldy, mask, acc);
    case XKV_CU_Q5_0:
        return xkv_cu_dot_type<XKV_CU_Q5_0>(tiles, n_col, y, ldy, mask, acc);
    case XKV_CU_Q4_0:
        return xkv_cu_dot_type<XKV_CU_Q4_0>(tiles, n_col, y, ldy, mask, acc);
    case XKV_CU_Q2_0:
        return xkv_cu_dot_type<XKV_CU_Q2_0>(tiles, n_col, y, ldy, mask, acc);
    default:
        return xkv_cu_dot_type<XKV_CU_Q1_0>(tiles, n_col, y, ldy, mask, acc);
    }
}

// sums of both lanes of a row
static __device__ __forceinline__ void xkv_cu_both(uint32_t mask, float (&acc)[XKV_CU_VECS]) {
#pragma unroll
    for (int i = 0; i < XKV_CU_VECS; ++i) {
        if (mask >> i & 1) {
            acc[i] += __shfl_xor_sync(XKV_CU_ALL, acc[i], 16);
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
