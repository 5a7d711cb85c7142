// Decoding on CUDA, second pass: V of refined blocks, over a span of chunks. A warp has 16 directions and goes through the chunks
// with the sums in registers.

#pragma once

#include "xkv-cu-decode.cuh"

// by a warp: the largest score of a query so far
static __device__ float xkv_cu_top(const xkv_cu_decode & b, int s, int j) {
    float top = -INFINITY;
    for (int k = xkv_cu_lane(); k < b.n_split; k += XKV_CU_WARP) {
        top = fmaxf(top, b.state[b.part(s, k, j)].x);
    }
    return xkv_cu_max(top);
}

struct xkv_cu_values_shared {
    float * top; // [XKV_CU_TILE] of each query
    float * old; // what the sums so far are relative to

    __host__ __device__ explicit xkv_cu_values_shared(xkv_cu_arena & at) {
        top = at.take<float>(XKV_CU_TILE);
        old = at.take<float>(XKV_CU_TILE);
    }
};

// grid: slice of directions, split of the chunks, tile of queries and stream; span: first chunk and end; begin: no sums so far
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_values(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int first, int end, bool begin) {
    XKV_DYNAMIC_SHARED(shared);
    xkv_cu_arena               arena = { (char *) shared };
    const xkv_cu_values_shared c(arena);
    const int                  s    = blockIdx.z % a.n_stream;
    const int                  j0   = blockIdx.z / a.n_stream * XKV_CU_TILE;
    const int                  n    = min(XKV_CU_TILE, b.n_query - j0);
    const int                  k    = blockIdx.y;
    const int                  rank = a.rank[XKV_CU_V];
    float *                    max  = b.deep_max + (((size_t) s * b.n_deep + k) * gridDim.x + blockIdx.x) * b.n_query + j0;

    bool any = false;
    for (int i = threadIdx.x; k + i / n * b.n_deep < end - first; i += blockDim.x) {
        any = any || b.fine[b.row(s, k + i / n * b.n_deep, j0 + i % n)];
    }
    if (!__syncthreads_or(any)) {
        for (int i = threadIdx.x; i < n && begin; i += blockDim.x) {
            max[i] = -INFINITY;
        }
        return;
    }
    for (int i = xkv_cu_warp(); i < n; i += xkv_cu_n_warp()) {
        const float top = xkv_cu_top(b, s, j0 + i);
        if (xkv_cu_lane() == 0) {
            c.top[i] = top;
            c.old[i] = begin ? -INFINITY : max[i];
            max[i]   = top;
        }
    }
    __syncthreads();
    const int d = blockIdx.x * XKV_CU_V_SLICE + xkv_cu_warp() * 16;
    if (d >= rank) {
        return;
    }
    const xkv_cu_segment & seg  = a.segments[XKV_CU_V][xkv_cu_find_segment(a, XKV_CU_V, d)];
    const int              cols = xkv_cu_cols(seg.type);
    const bool             lead = d < a.lead[XKV_CU_V];

    float acc[XKV_CU_G][4];
#pragma unroll
    for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int   i   = min(8 * g + xkv_cu_lane() % 4 * 2 + e % 2, n - 1);
            const float had = c.old[i] > -INFINITY ? b.deep[b.deep_part(s, k, j0 + i) * rank + d + xkv_cu_lane() / 4 + e / 2 * 8] : 0.0f;
            acc[g][e]       = had * xkv_cu_rescale(c.old[i], c.top[i]);
        }
    }
    for (int i = k; i < end - first; i += b.n_deep) {
        const uint8_t * tiles =
            xkv_cu_coef(a, first + i, s, XKV_CU_V, seg, 0) + (d - seg.first) / 16 * xkv_cu_rows_bytes(seg.type, a.n_chunk);
        uint32_t some   = 0; // queries that have blocks here
        uint32_t blocks = 0;
        if (xkv_cu_lane() < n) {
            blocks = b.fine[b.row(s, i, j0 + xkv_cu_lane())];
        }
        some = __ballot_sync(XKV_CU_ALL, blocks != 0);
        if (!some) {
            continue;
        }
#pragma unroll
        for (int o = 1; o < XKV_CU_WARP; o *= 2) {
            blocks |= __shfl_xor_sync(XKV_CU_ALL, blocks, o);
        }
        // where a query has none, a row that is there: its column is not added
        const int other = __ffs((int) some) - 1;
        const int base  = (int) b.row(s, i, j0);
        auto      group = xkv_cu_columns<XKV_CU_G>(n, [=](int c) { return base + (some >> c & 1 ? c : other); });
        group.on        = 0;
#pragma unroll
        for (int g = 0; g < XKV_CU_G; ++g) {
            group.on |= (uint32_t) ((some >> 8 * g & 255) != 0) << g;
        }
        float part[XKV_CU_G][4] = {};
        for (int t = 0; t < a.n_chunk; t += cols) {
            if (blocks >> t / XKV_CU_FINE & ((1u << cols / XKV_CU_FINE) - 1)) {
                const uint8_t * tile = tiles + xkv_cu_rows_bytes(seg.type, t);
                for (int w = 0; w < (lead ? 2 : 1); ++w) {
                    xkv_cu_mul(seg.type, tile, cols, w == 0 ? b.fresh : b.taken, t, group, part);
                }
            }
        }
#pragma unroll
        for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int col = 8 * g + xkv_cu_lane() % 4 * 2 + e % 2;
                if (some >> col & 1) {
                    acc[g][e] += part[g][e] * xkv_cu_rescale(b.top[base + col], c.top[col]);
                }
            }
        }
    }
#pragma unroll
    for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int i = 8 * g + xkv_cu_lane() % 4 * 2 + e % 2;
            if (i < n) {
                b.deep[b.deep_part(s, k, j0 + i) * rank + d + xkv_cu_lane() / 4 + e / 2 * 8] = acc[g][e];
            }
        }
    }
}
