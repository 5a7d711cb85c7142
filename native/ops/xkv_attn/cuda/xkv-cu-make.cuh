// Many queries on CUDA: K and V of stored tokens, as a product of two matrices of tiles. K is tokens by directions times directions
// by numbers of a head; V is numbers of a head by directions times directions by tokens.

#pragma once

#include "xkv-cu-prefill.cuh"

#define XKV_CU_MAKE_M     64  // rows of a block of threads: 32 of a warp
#define XKV_CU_MAKE_N     128 // columns: 32 of a warp
#define XKV_CU_MAKE_DEPTH 32  // directions that are summed from one load of shared memory

// numbers of a row of a panel: 8 rows begin in different banks
#define XKV_CU_MAKE_LD (XKV_CU_MAKE_DEPTH + 8)

struct xkv_cu_panels {
    uint32_t * a; // [XKV_CU_MAKE_M][XKV_CU_MAKE_LD] halves
    uint32_t * b; // [XKV_CU_MAKE_N][XKV_CU_MAKE_LD]

    __host__ __device__ explicit xkv_cu_panels(xkv_cu_arena & at) {
        a = at.take<uint32_t>(XKV_CU_MAKE_M * XKV_CU_MAKE_LD / 2);
        b = at.take<uint32_t>(XKV_CU_MAKE_N * XKV_CU_MAKE_LD / 2);
    }

    // acc += a b^T of the warp's 32 by 32, to a depth
    __device__ void multiply(int depth, float (&acc)[2][4][4]) const {
        const int r  = xkv_cu_lane() / 4;
        const int j  = xkv_cu_lane() % 4;
        const int m0 = xkv_cu_warp() / 4 * 32;
        const int n0 = xkv_cu_warp() % 4 * 32;
        const int ld = XKV_CU_MAKE_LD / 2;
        for (int k = 0; k < depth / 2; k += 8) {
            uint32_t x[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    x[m][i] = a[(m0 + 16 * m + r + i % 2 * 8) * ld + k + j + i / 2 * 4];
                }
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const uint32_t * p    = b + (n0 + 8 * n + r) * ld + k + j;
                const uint32_t   y[2] = { p[0], p[4] };
                xkv_cu_mma_f16(acc[0][n], x[0], y);
                xkv_cu_mma_f16(acc[1][n], x[1], y);
            }
        }
    }
};

// tokens, or numbers of a head, from first on
struct xkv_cu_make_block {
    const xkv_cu_attn & a;

    int s, head, kd;
    int token, n_token; // of the chunks
    int number;         // of a head
    int seen;           // bit i: 32 tokens from token + 32 i on, which some query sees

    // directions [r, r + depth) of n tokens of the segment, depth beyond the segment's rank as 0
    __device__ void load_coef(const xkv_cu_segment & seg, int r, uint32_t * panel) const {
        // entries of 4: of a row side by side in a word of the tile, so that threads that follow each other have rows
        const bool k     = kd == XKV_CU_K;
        const int  depth = XKV_CU_MAKE_DEPTH;
        const int  rows  = k ? n_token : depth;
        for (int e = threadIdx.x; e < n_token * depth / 4; e += blockDim.x) {
            const int row = e % rows;
            const int col = e / rows * 4;
            const int t   = token + (k ? row : col);
            const int d   = r + (k ? col : row);
            float4    x   = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (d < seg.rank && (seen >> (t - token) / 32 & 1)) {
                const uint8_t * tiles = xkv_cu_coef(a, t / a.n_chunk, s, kd, seg, head);
                const int       at    = t % a.n_chunk;
                x = k ? xkv_cu_four_at(seg.type, tiles, seg.rank, at, d) : xkv_cu_four_at(seg.type, tiles, a.n_chunk, d, at);
            }
            store(panel, k, row, col, x);
        }
    }

    // the same of n numbers of a head
    __device__ void load_basis(const xkv_cu_segment & seg, int r, int n, uint32_t * panel) const {
        const bool      k     = kd == XKV_CU_K;
        const int       dim   = a.dim[kd];
        const int       depth = XKV_CU_MAKE_DEPTH;
        const int       rows  = k ? depth : n;
        const uint8_t * tiles = xkv_cu_basis(a, kd, seg, head);
        for (int e = threadIdx.x; e < n * depth / 4; e += blockDim.x) {
            const int row = e % rows;
            const int col = e / rows * 4;
            const int x   = number + (k ? col : row);
            const int d   = r + (k ? row : col);
            float4    y   = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (x < dim && d < seg.rank) {
                y = k ? xkv_cu_four_at(seg.type_basis, tiles, dim, d, x) : xkv_cu_four_at(seg.type_basis, tiles, seg.rank, x, d);
            }
            store(panel, !k, row, col, y);
        }
    }

    // 4 numbers of a tile's row, which is the panel's too, or its depth
    __device__ static void store(uint32_t * panel, bool same, int row, int col, const float4 & x) {
        if (same) {
            uint32_t * p = panel + (row * XKV_CU_MAKE_LD + col) / 2;
            p[0]         = xkv_cu_pack_half(x.x, x.y);
            p[1]         = xkv_cu_pack_half(x.z, x.w);
            return;
        }
        half * p              = (half *) panel + col * XKV_CU_MAKE_LD + row;
        p[0]                  = __float2half(x.x);
        p[XKV_CU_MAKE_LD]     = __float2half(x.y);
        p[2 * XKV_CU_MAKE_LD] = __float2half(x.z);
        p[3 * XKV_CU_MAKE_LD] = __float2half(x.w);
    }

    __device__ void find_seen() {
        seen = 0;
        for (int t = 0; t < n_token; t += 32) {
            bool any = false;
            for (int i = threadIdx.x; i < a.n_tps; i += blockDim.x) {
                any = any || xkv_cu_n_fill(a, (token + t) / a.n_chunk, i, s) > (token + t) % a.n_chunk;
            }
            seen |= (__syncthreads_or(any) ? 1 : 0) << t / 32;
        }
    }

    // a number without bases
    __device__ float plain(int t, int d) const {
        const xkv_cu_segment & seg   = a.segments[kd][xkv_cu_find_segment(a, kd, d)];
        const uint8_t *        tiles = xkv_cu_coef(a, t / a.n_chunk, s, kd, seg, head);
        const bool             k     = kd == XKV_CU_K;
        const int              row   = k ? t % a.n_chunk : d - seg.first;
        const int              col   = k ? d - seg.first : t % a.n_chunk;
        const float4           x     = xkv_cu_four_at(seg.type, tiles, k ? seg.rank : a.n_chunk, row, col / 4 * 4);
        return col % 4 == 0 ? x.x : col % 4 == 1 ? x.y : col % 4 == 2 ? x.z : x.w;
    }
};

// blocks of threads for K or V of n tokens of a head
static inline __host__ __device__ int xkv_cu_make_tiles(int kd, int n, int dim) {
    const int m_size = kd == XKV_CU_K ? n : dim;
    const int n_size = kd == XKV_CU_K ? dim : n;
    return (m_size + XKV_CU_MAKE_M - 1) / XKV_CU_MAKE_M * ((n_size + XKV_CU_MAKE_N - 1) / XKV_CU_MAKE_N);
}

// n tokens from first on; grid: blocks of a head, 2 * KV head + kind
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_make(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first, int n) {
    XKV_DYNAMIC_SHARED(shared);
    const int  kd   = blockIdx.y % 2;
    const int  head = blockIdx.y / 2;
    const int  dim  = a.dim[kd];
    const bool k    = kd == XKV_CU_K;
    if ((int) blockIdx.x >= xkv_cu_make_tiles(kd, n, dim)) {
        return;
    }
    const int n_n  = ((k ? dim : n) + XKV_CU_MAKE_N - 1) / XKV_CU_MAKE_N;
    const int m0   = blockIdx.x / n_n * XKV_CU_MAKE_M;
    const int n0   = blockIdx.x % n_n * XKV_CU_MAKE_N;
    const int slot = k ? m0 : n0; // in the batch

    xkv_cu_make_block c{ a, s, head, kd, first + slot, min(k ? XKV_CU_MAKE_M : XKV_CU_MAKE_N, n - slot), k ? n0 : m0, 0 };
    c.find_seen();
    if (k && !c.seen) {
        return; // its scores are masked; V has to be numbers
    }
    xkv_cu_arena        arena = { (char *) shared };
    const xkv_cu_panels p(arena);
    float               acc[2][4][4] = {};
    for (int is = 0; is < a.n_segment[kd] && !a.plain && c.seen; ++is) {
        const xkv_cu_segment & seg = a.segments[kd][is];
        for (int r = 0; r < seg.rank; r += XKV_CU_MAKE_DEPTH) {
            c.load_coef(seg, r, k ? p.a : p.b);
            c.load_basis(seg, r, k ? XKV_CU_MAKE_N : XKV_CU_MAKE_M, k ? p.b : p.a);
            __syncthreads();
            p.multiply(min(XKV_CU_MAKE_DEPTH, seg.rank - r), acc);
            __syncthreads();
        }
    }
    const int m = m0 + xkv_cu_warp() / 4 * 32 + xkv_cu_lane() / 4;
    const int l = n0 + xkv_cu_warp() % 4 * 32 + xkv_cu_lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int row = m + 8 * i;
            const int col = l + 8 * e;
            const int t   = k ? row : col;
            const int d   = k ? col : row;
            if (t >= n || d >= dim) {
                continue;
            }
            float x = acc[i / 2][e][i % 2 * 2];
            float y = acc[i / 2][e][i % 2 * 2 + 1];
            if (a.plain && (c.seen >> (t - slot) / 32 & 1)) {
                x = c.plain(first + t, d);
                y = k ? c.plain(first + t, d + 1) : c.plain(first + t + 1, d);
            }
            if (k) {
                *(float2 *) (b.made + ((size_t) head * XKV_CU_BATCH + t) * dim + d) = make_float2(x, y);
            } else {
                *(uint32_t *) (b.v + ((size_t) head * dim + d) * XKV_CU_BATCH + t) = xkv_cu_pack_half(x, y);
            }
        }
    }
}
