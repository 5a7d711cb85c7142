// Decoding on CUDA: sums of all parts, through the basis of V.

#pragma once

#include "xkv-cu-decode.cuh"

#define XKV_CU_MERGE_ROWS  32  // numbers of a head that a block of threads makes
#define XKV_CU_MERGE_SLICE 512 // directions that are added up at a time
#define XKV_CU_MERGE_STRIP 128 // directions that a warp multiplies

struct xkv_cu_merge_block {
    const xkv_cu_attn &   a;
    const xkv_cu_decode & b;

    int s, j0, n; // up to 8 queries of a KV head

    // shared by the block
    xkv_cu_rows z;     // [8] a slice of the sums
    float *     part;  // [warp][XKV_CU_MERGE_ROWS][8]
    float2 *    total; // [8]

    __host__ __device__ xkv_cu_merge_block(const xkv_cu_attn & a, const xkv_cu_decode & b, int s, int j0, int n, xkv_cu_arena & at) :
        a(a), b(b), s(s), j0(j0), n(n) {
        z.take(at, 8, XKV_CU_MERGE_SLICE, a.basis_ints[XKV_CU_V], a.basis_floats[XKV_CU_V]);
        part  = at.take<float>(XKV_CU_THREADS / XKV_CU_WARP * XKV_CU_MERGE_ROWS * 8);
        total = at.take<float2>(8);
    }

    // direction r of query i over all parts
    __device__ float sum(int i, int r) const {
        const float max = total[i].x;
        float       res = 0.0f;
        for (int k = 0; k < b.n_split && r < b.lead_v; ++k) {
            res += xkv_cu_rescale(b.sums_max[b.part(s, k, j0 + i)], max) * b.sums[b.part(s, k, j0 + i) * b.lead_v + r];
        }
        const int n_slice = (a.rank[XKV_CU_V] + XKV_CU_V_SLICE - 1) / XKV_CU_V_SLICE;
        for (int k = 0; k < b.n_deep; ++k) {
            const float old = b.deep_max[(((size_t) s * b.n_deep + k) * n_slice + r / XKV_CU_V_SLICE) * b.n_query + j0 + i];
            if (old > -INFINITY) {
                res += expf(old - max) * b.deep[b.deep_part(s, k, j0 + i) * a.rank[XKV_CU_V] + r];
            }
        }
        return res;
    }

    __device__ void load(int first, int n_number) const {
        const int n_part = (n_number + 4 * XKV_CU_WARP - 1) / (4 * XKV_CU_WARP);
        for (int item = xkv_cu_warp(); item < n * n_part; item += xkv_cu_n_warp()) {
            const int  col  = item % n_part * 4 * XKV_CU_WARP + 4 * xkv_cu_lane();
            const bool on   = col < n_number;
            float      x[4] = {};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                x[e] = on ? sum(item / n_part, first + col + e) : 0.0f;
            }
            // numbers end with a quantization block, or rows that only floats read
            xkv_cu_round(z, item / n_part, col, make_float4(x[0], x[1], x[2], x[3]), on);
        }
    }

    // rows d and d + 16 of the basis times the sums, in part
    __device__ void multiply(int head, int d) const {
        const auto group        = xkv_cu_columns<1>(n, [](int i) { return i; });
        float      acc[2][1][4] = {};
        for (int is = 0; is < a.n_segment[XKV_CU_V]; ++is) {
            const xkv_cu_segment & seg   = a.segments[XKV_CU_V][is];
            const uint8_t *        base  = xkv_cu_basis(a, XKV_CU_V, seg, head);
            const size_t           bytes = xkv_cu_rows_bytes(seg.type_basis, seg.rank);
            for (int r0 = 0; r0 < seg.rank; r0 += XKV_CU_MERGE_SLICE) {
                const int n_number = ::min(XKV_CU_MERGE_SLICE, seg.rank - r0);
                load(seg.first + r0, n_number);
                __syncthreads();
                for (int r = xkv_cu_warp() * XKV_CU_MERGE_STRIP; r < n_number; r += xkv_cu_n_warp() * XKV_CU_MERGE_STRIP) {
                    const int n_col = ::min(XKV_CU_MERGE_STRIP, n_number - r);
                    for (int i = 0; i < 2 && d + 16 * i < a.dim[XKV_CU_V]; ++i) {
                        const uint8_t * tiles = base + (d / 16 + i) * bytes + xkv_cu_rows_bytes(seg.type_basis, r0 + r);
                        xkv_cu_mul(seg.type_basis, tiles, n_col, z, r, group, i == 0 ? acc[0] : acc[1]);
                    }
                }
                __syncthreads();
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = 16 * i + xkv_cu_lane() / 4 + e / 2 * 8;

                part[(xkv_cu_warp() * XKV_CU_MERGE_ROWS + row) * 8 + xkv_cu_lane() % 4 * 2 + e % 2] = acc[i][0][e];
            }
        }
    }

    // a number of a query: exact tokens, then stored ones
    __device__ float number(int i, int d, int d0) const {
        const int dv  = a.dim[XKV_CU_V];
        float     res = 0.0f;
        for (int k = 0; k < b.n_exact; ++k) {
            const size_t at = b.span(s, k, j0 + i);
            res += xkv_cu_rescale(b.exact_state[at].x, total[i].x) * b.exact[at * dv + d];
        }
        if (b.n_split == 0) {
            return res;
        }
        if (a.plain) {
            return res + sum(i, d);
        }
        for (int k = 0; k < xkv_cu_n_warp(); ++k) {
            res += part[(k * XKV_CU_MERGE_ROWS + d - d0) * 8 + i];
        }
        return res;
    }
};

// grid: numbers of a head, queries of a KV head, stream
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_merge(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b) {
    XKV_DYNAMIC_SHARED(shared);
    const int m      = a.n_tps * a.n_gqa;
    const int n_unit = (m + 7) / 8;
    const int head   = blockIdx.y / n_unit;
    const int first  = blockIdx.y % n_unit * 8;
    const int s      = blockIdx.z;
    const int dv     = a.dim[XKV_CU_V];
    const int d0     = blockIdx.x * XKV_CU_MERGE_ROWS;

    xkv_cu_arena             arena = { (char *) shared };
    const xkv_cu_merge_block c(a, b, s, head * m + first, min(8, m - first), arena);
    for (int i = xkv_cu_warp(); i < c.n; i += xkv_cu_n_warp()) {
        const float2 total = xkv_cu_total(a, b, s, c.j0 + i);
        if (xkv_cu_lane() == 0) {
            c.total[i] = total;
        }
    }
    __syncthreads();
    if (!a.plain && b.n_split > 0) {
        c.multiply(head, d0);
        __syncthreads();
    }
    for (int e = threadIdx.x; e < c.n * XKV_CU_MERGE_ROWS; e += blockDim.x) {
        const int i = e / XKV_CU_MERGE_ROWS;
        const int d = d0 + e % XKV_CU_MERGE_ROWS;
        if (d < dv) {
            // a sum that is not a number is no 0
            float * out = a.dst + ((size_t) s * b.n_query + xkv_cu_find_query(a, c.j0 + i).out) * dv + d;
            *out        = c.total[i].y == 0.0f ? 0.0f : c.number(i, d, d0) / c.total[i].y;
        }
    }
}
