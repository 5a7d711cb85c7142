// Rows of numbers (queries, weights) that meet tiles: rounded to 8 bits by blocks of 32, for tensor cores, and as they are, for
// tiles of f32 and f16. A row is its codes, then a scale and the sum of the codes for each block.

#pragma once

#include "xkv-cu-mma.cuh"
#include "xkv-cu-tiles.cuh"

#define XKV_CU_ROUND 32 // numbers that are rounded with one scale

// of a block
struct alignas(8) xkv_cu_scale {
    float d;
    int   sum;
};

static_assert(sizeof(xkv_cu_scale) * 4 == XKV_CU_ROUND, "a block's scale is at a quarter of its codes' place");

struct xkv_cu_rows {
    uint8_t * bytes; // nullptr without tiles of integers
    float *   x;     // nullptr without tiles of floats
    int       n;     // numbers of a row, a multiple of XKV_CU_ROUND

    __host__ __device__ static size_t row_bytes(int n) { return (size_t) n / XKV_CU_ROUND * (XKV_CU_ROUND + sizeof(xkv_cu_scale)); }

    __host__ __device__ static int width(int n) { return (n + XKV_CU_ROUND - 1) / XKV_CU_ROUND * XKV_CU_ROUND; }

    // bytes of memory for a row
    __host__ __device__ static size_t size(int n, bool ints, bool floats) {
        return (ints ? row_bytes(n) : 0) + (floats ? n * sizeof(float) : 0);
    }

    __host__ __device__ void take(xkv_cu_arena & at, size_t n_row, int n_number, bool ints, bool floats) {
        n     = n_number;
        bytes = ints ? at.take<uint8_t>(n_row * row_bytes(n)) : nullptr;
        x     = floats ? at.take<float>(n_row * n) : nullptr;
    }

    __device__ __forceinline__ uint8_t *      codes(size_t row) const { return bytes + row * row_bytes(n); }
    __device__ __forceinline__ xkv_cu_scale * scales(size_t row) const { return (xkv_cu_scale *) (codes(row) + n); }
    __device__ __forceinline__ float *        floats(size_t row) const { return x + row * n; }
};

// a code's factor; what is not a number stays visible in the scale
static __device__ __forceinline__ float xkv_cu_factor(uint32_t bits) {
    const float most = __uint_as_float(bits);
    return most > 1e-30f ? 127.0f / most : 0.0f;
}

static __device__ __forceinline__ uint32_t xkv_cu_size_bits(float x) {
    return __float_as_uint(x) & 0x7fffffffu;
}

// By a warp: rounds 4 numbers of each lane, 8 lanes a block, at column col of a row; lanes that are off have none. With part they
// are stored, without only their block's scale is as if they had been.
static __device__ __forceinline__ void xkv_cu_round(const xkv_cu_rows & rows, size_t row, int col, float4 v, bool on, bool part = true,
                                                    float sign = 1.0f) {
    if (rows.x && on) {
        *(float4 *) (rows.floats(row) + col) =
            part ? make_float4(sign * v.x, sign * v.y, sign * v.z, sign * v.w) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    if (!rows.bytes) {
        return;
    }
    uint32_t most = max(max(xkv_cu_size_bits(v.x), xkv_cu_size_bits(v.y)), max(xkv_cu_size_bits(v.z), xkv_cu_size_bits(v.w)));
#pragma unroll
    for (int i = 1; i < 8; i *= 2) {
        most = max(most, __shfl_xor_sync(XKV_CU_ALL, most, i));
    }
    const float    f = xkv_cu_factor(most);
    const uint32_t w = (__float2int_rn(v.x * f) & 255) | (__float2int_rn(v.y * f) & 255) << 8 | (__float2int_rn(v.z * f) & 255) << 16 |
                       (uint32_t) __float2int_rn(v.w * f) << 24;
    int sum = part ? __dp4a((int) w, 0x01010101, 0) : 0;
#pragma unroll
    for (int i = 1; i < 8; i *= 2) {
        sum += __shfl_xor_sync(XKV_CU_ALL, sum, i);
    }
    if (on) {
        *(uint32_t *) (rows.codes(row) + col) = part ? w : 0;
        if (xkv_cu_lane() % 8 == 0) {
            rows.scales(row)[col / XKV_CU_ROUND] = { sign * __uint_as_float(most) / 127.0f, sum };
        }
    }
}

// Rows that a warp multiplies tiles with, 8 to a group: column i is row_of(i), found anew for each product, since registers are
// what these kernels are short of.
template <int G, typename F> struct xkv_cu_group {
    F        row_of;
    int      n_col;
    uint32_t on; // groups with some

    // the lane's row of b, and those of its columns of c
    __device__ __forceinline__ int b(int g) const { return row_of(min(8 * g + xkv_cu_lane() / 4, n_col - 1)); }
    __device__ __forceinline__ int c(int g, int i) const { return row_of(min(8 * g + xkv_cu_lane() % 4 * 2 + i, n_col - 1)); }
};

template <int G, typename F> static __device__ __forceinline__ xkv_cu_group<G, F> xkv_cu_columns(int n_col, F row_of) {
    return { row_of, n_col, (1u << (n_col + 7) / 8) - 1 };
}

template <int type, int G, typename F>
static __device__ __forceinline__ void xkv_cu_mul_ints(const uint8_t * __restrict__ tiles, int n_col, const xkv_cu_rows & rows, int col,
                                                       const xkv_cu_group<G, F> & at, float (&acc)[G][4]) {
    constexpr int zero = xkv_cu_zero(type);
    const int     r    = xkv_cu_lane() / 4;
    const int     j    = xkv_cu_lane() % 4;
    const int     step = (int) xkv_cu_rows::row_bytes(rows.n);
    int           b0[G], s0[G], s1[G]; // bytes to the codes and the scales of the lane's rows
#pragma unroll
    for (int g = 0; g < G; ++g) {
        b0[g] = at.b(g) * step + 8 * j;
        s0[g] = at.c(g, 0) * step + rows.n;
        s1[g] = at.c(g, 1) * step + rows.n;
    }
    for (int c = col; c < col + n_col; c += xkv_cu_cols(type), tiles += xkv_cu_tile_bytes(type)) {
        const float d0 = xkv_cu_half(tiles + 2 * r);
        const float d1 = xkv_cu_half(tiles + 2 * r + 16);
#pragma unroll 2
        for (int part = 0; part < xkv_cu_cols(type) / XKV_CU_ROUND; ++part) {
            const int k = c + part * XKV_CU_ROUND;
            uint32_t  a[4];
            xkv_cu_codes<type>(tiles, part, a);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                if (at.on >> g & 1) {
                    const uint2        w    = *(const uint2 *) (rows.bytes + (b0[g] + k));
                    const uint32_t     b[2] = { w.x, w.y };
                    const xkv_cu_scale x    = *(const xkv_cu_scale *) (rows.bytes + (s0[g] + k / 4));
                    const xkv_cu_scale y    = *(const xkv_cu_scale *) (rows.bytes + (s1[g] + k / 4));
                    int                sums[4];
                    sums[0] = sums[2] = -zero * x.sum;
                    sums[1] = sums[3] = -zero * y.sum;
                    xkv_cu_mma_s8(sums, a, b);
                    acc[g][0] += d0 * x.d * (float) sums[0];
                    acc[g][1] += d0 * y.d * (float) sums[1];
                    acc[g][2] += d1 * x.d * (float) sums[2];
                    acc[g][3] += d1 * y.d * (float) sums[3];
                }
            }
        }
    }
}

template <int type, int G, typename F>
static __device__ __forceinline__ void xkv_cu_mul_floats(const uint8_t * __restrict__ tiles, int n_col, const xkv_cu_rows & rows, int col,
                                                         const xkv_cu_group<G, F> & at, float (&acc)[G][4]) {
    const int     r = xkv_cu_lane() / 4;
    const float * y0[G];
    const float * y1[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
        y0[g] = rows.floats(at.c(g, 0)) + col;
        y1[g] = rows.floats(at.c(g, 1)) + col;
    }
    for (int c = 0; c < n_col; ++c) {
        const int   i  = c * XKV_CU_TILE_ROWS + r;
        const float x0 = type == XKV_CU_F32 ? ((const float *) tiles)[i] : xkv_cu_half((const half *) tiles + i);
        const float x1 = type == XKV_CU_F32 ? ((const float *) tiles)[i + 8] : xkv_cu_half((const half *) tiles + i + 8);
#pragma unroll
        for (int g = 0; g < G; ++g) {
            if (at.on >> g & 1) {
                acc[g][0] += x0 * y0[g][c];
                acc[g][1] += x0 * y1[g][c];
                acc[g][2] += x1 * y0[g][c];
                acc[g][3] += x1 * y1[g][c];
            }
        }
    }
}

// By a warp: adds the products of 16 rows, whose n_col columns are in tiles that follow each other, and columns [col, col + n_col)
// of the group's rows; acc is laid out as c of xkv-cu-mma.cuh.
template <int G, typename F>
static __device__ void xkv_cu_mul(int type, const uint8_t * tiles, int n_col, const xkv_cu_rows & rows, int col,
                                  const xkv_cu_group<G, F> & at, float (&acc)[G][4]) {
    switch (type) {
    case XKV_CU_F32:
        return xkv_cu_mul_floats<XKV_CU_F32>(tiles, n_col, rows, col, at, acc);
    case XKV_CU_F16:
        return xkv_cu_mul_floats<XKV_CU_F16>(tiles, n_col, rows, col, at, acc);
    case XKV_CU_Q8_0:
        return xkv_cu_mul_ints<XKV_CU_Q8_0>(tiles, n_col, rows, col, at, acc);
    case XKV_CU_Q5_0:
        return xkv_cu_mul_ints<XKV_CU_Q5_0>(tiles, n_col, rows, col, at, acc);
    case XKV_CU_Q4_0:
        return xkv_cu_mul_ints<XKV_CU_Q4_0>(tiles, n_col, rows, col, at, acc);
    case XKV_CU_Q2_0:
        return xkv_cu_mul_ints<XKV_CU_Q2_0>(tiles, n_col, rows, col, at, acc);
    default:
        return xkv_cu_mul_ints<XKV_CU_Q1_0>(tiles, n_col, rows, col, at, acc);
    }
}
