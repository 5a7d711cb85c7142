// Tiles on Metal (xkv-tiles.h): 16 rows by one quantization block. A SIMD group reads the words of 16 rows side by side.

#pragma once

#include "xkv-mtl-lang.h"

static inline int xkv_mtl_cols(int type) {
    return type <= XKV_MTL_F16 ? 16 : type <= XKV_MTL_Q4_0 ? 32 : type == XKV_MTL_Q2_0 ? 64 : 128;
}

static inline int xkv_mtl_tile_bytes(int type) {
    return type == XKV_MTL_F32 ? 1024 : type == XKV_MTL_F16 ? 512 : type == XKV_MTL_Q8_0 ? 544 : type == XKV_MTL_Q5_0 ? 352 : 288;
}

// 16 rows of n_col columns
static inline int xkv_mtl_rows_bytes(int type, int n_col) {
    return n_col / xkv_mtl_cols(type) * xkv_mtl_tile_bytes(type);
}

// columns 4k to 4k + 3 of a row
template <int type> static inline float4 xkv_mtl_four(device const uchar * tile, int row, int k) {
    if (type == XKV_MTL_F32) {
        device const float * p = (device const float *) tile + 64 * k + row;
        return float4(p[0], p[16], p[32], p[48]);
    }
    if (type == XKV_MTL_F16) {
        device const half * p = (device const half *) tile + 64 * k + row;
        return float4((float) p[0], (float) p[16], (float) p[32], (float) p[48]);
    }
    device const uint * u = (device const uint *) (tile + 32) + row;
    uint                w;
    float               zero;
    switch (type) {
    case XKV_MTL_Q8_0:
        w    = u[16 * k];
        zero = 128.0f;
        break;
    case XKV_MTL_Q5_0:
        w    = ((u[16 * (k / 2)] >> (4 * (k % 2))) & 0x0F0F0F0Fu) | (((u[64] >> k) & 0x01010101u) << 4);
        zero = 16.0f;
        break;
    case XKV_MTL_Q4_0:
        w    = (u[16 * (k / 2)] >> (4 * (k % 2))) & 0x0F0F0F0Fu;
        zero = 8.0f;
        break;
    case XKV_MTL_Q2_0:
        w    = (u[16 * (k / 4)] >> (2 * (k % 4))) & 0x03030303u;
        zero = 1.0f;
        break;
    default: // Q1_0, codes 0 and 2
        w    = ((u[16 * (k / 8)] >> (k % 8)) & 0x01010101u) << 1;
        zero = 1.0f;
        break;
    }
    return (float4(as_type<uchar4>(w)) - zero) * (float) *(device const half *) (tile + 2 * row);
}

// all: whether all vectors are in the mask, which is the usual case and has no branches
template <int type, bool all>
static inline void xkv_mtl_dot_some(device const uchar * tiles, int n_col, threadgroup const float * y, int ldy, uint mask, int lane,
                                    thread float * acc) {
    const int cols = xkv_mtl_cols(type);
    const int row  = lane % 16;
    const int odd  = lane / 16;
    for (int c = 0; c < n_col; c += cols, tiles += xkv_mtl_tile_bytes(type)) {
        for (int j = 0; j < cols / 8; ++j) {
            const int                 i4 = 2 * j + odd;
            const float4              x  = xkv_mtl_four<type>(tiles, row, i4);
            threadgroup const float * z  = y + c + 4 * i4;
            XKV_MTL_UNROLL
            for (int i = 0; i < XKV_MTL_VECS; ++i) {
                if (all || ((mask >> i) & 1) != 0) {
                    acc[i] += dot(x, *(threadgroup const float4 *) (z + i * ldy));
                }
            }
        }
    }
}

template <int type>
static inline void xkv_mtl_dot_type(device const uchar * tiles, int n_col, threadgroup const float * y, int ldy, uint mask, int lane,
                                    thread float * acc) {
    if (mask == (1u << XKV_MTL_VECS) - 1) {
        xkv_mtl_dot_some<type, true>(tiles, n_col, y, ldy, mask, lane, acc);
    } else {
        xkv_mtl_dot_some<type, false>(tiles, n_col, y, ldy, mask, lane, acc);
    }
}

// By a SIMD group: adds the products of 16 rows, whose n_col columns are in tiles that follow each other, and the vectors y in mask.
// The two lanes of a row have half of the sum each, see xkv_mtl_both.
static inline void xkv_mtl_dot(int type, device const uchar * tiles, int n_col, threadgroup const float * y, int ldy, uint mask, int lane,
                               thread float * acc) {
    switch (type) {
    case XKV_MTL_F32:
        return xkv_mtl_dot_type<XKV_MTL_F32>(tiles, n_col, y, ldy, mask, lane, acc);
    case XKV_MTL_F16:
        return xkv_mtl_dot_type<XKV_MTL_F16>(tiles, n_col, y, ldy, mask, lane, acc);
    case XKV_MTL_Q8_0:
        return xkv_mtl_dot_type<XKV_MTL_Q8_0>(tiles, n_col, y, ldy, mask, lane, acc);
    case XKV_MTL_Q5_0:
        return xkv_mtl_dot_type<XKV_MTL_Q5_0>(tiles, n_col, y, ldy, mask, lane, acc);
    case XKV_MTL_Q4_0:
        return xkv_mtl_dot_type<XKV_MTL_Q4_0>(tiles, n_col, y, ldy, mask, lane, acc);
    case XKV_MTL_Q2_0:
        return xkv_mtl_dot_type<XKV_MTL_Q2_0>(tiles, n_col, y, ldy, mask, lane, acc);
    default:
        return xkv_mtl_dot_type<XKV_MTL_Q1_0>(tiles, n_col, y, ldy, mask, lane, acc);
    }
}

// sums of both lanes of a row
static inline void xkv_mtl_both(uint mask, thread float * acc) {
    XKV_MTL_UNROLL
    for (int i = 0; i < XKV_MTL_VECS; ++i) {
        if (((mask >> i) & 1) != 0) {
            acc[i] += simd_shuffle_xor(acc[i], (ushort) 16);
        }
    }
}

template <int type> static inline float4 xkv_mtl_four_of(device const uchar * tiles, int n_col, int row, int col) {
    const int cols = xkv_mtl_cols(type);
    tiles += row / 16 * xkv_mtl_rows_bytes(type, n_col) + col / cols * xkv_mtl_tile_bytes(type);
    return xkv_mtl_four<type>(tiles, row % 16, col % cols / 4);
}

// four columns from col on of a row of a matrix of n_col columns
static inline float4 xkv_mtl_four_at(int type, device const uchar * tiles, int n_col, int row, int col) {
    switch (type) {
    case XKV_MTL_F32:
        return xkv_mtl_four_of<XKV_MTL_F32>(tiles, n_col, row, col);
    case XKV_MTL_F16:
        return xkv_mtl_four_of<XKV_MTL_F16>(tiles, n_col, row, col);
    case XKV_MTL_Q8_0:
        return xkv_mtl_four_of<XKV_MTL_Q8_0>(tiles, n_col, row, col);
    case XKV_MTL_Q5_0:
        return xkv_mtl_four_of<XKV_MTL_Q5_0>(tiles, n_col, row, col);
    case XKV_MTL_Q4_0:
        return xkv_mtl_four_of<XKV_MTL_Q4_0>(tiles, n_col, row, col);
    case XKV_MTL_Q2_0:
        return xkv_mtl_four_of<XKV_MTL_Q2_0>(tiles, n_col, row, col);
    default:
        return xkv_mtl_four_of<XKV_MTL_Q1_0>(tiles, n_col, row, col);
    }
}
