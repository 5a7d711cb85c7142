// Many queries on CUDA: how they meet a batch of tokens. A warp has 16 queries, their weights go from the registers of scores into
// the product with V.

#pragma once

#include "xkv-cu-prefill.cuh"

#define XKV_CU_ROWS  16  // queries of a warp
#define XKV_CU_DEPTH 128 // numbers of K that are in shared memory at a time

// numbers of a row of a panel: 8 rows begin in different banks
#define XKV_CU_LD_K (XKV_CU_DEPTH + 8)
#define XKV_CU_LD_V (XKV_CU_STEP + 8)

// warps of a block, as many as the queries' numbers leave room for
static inline __host__ __device__ int xkv_cu_attend_warps(const xkv_cu_attn & a) {
    return a.dim[XKV_CU_K] <= 128 ? 4 : a.dim[XKV_CU_K] <= 256 ? 2 : 1;
}

struct xkv_cu_attend_shared {
    uint32_t * q;     // [rows][d_k + 8] halves
    uint32_t * panel; // [XKV_CU_STEP][XKV_CU_LD_K] of K, then [XKV_CU_PIECE][XKV_CU_LD_V] of V
    int *      see;   // [rows][2] stored tokens of each half of a step that a query sees
    int *      out;   // see xkv_cu_query

    __host__ __device__ xkv_cu_attend_shared(const xkv_cu_attn & a, xkv_cu_arena & at) {
        const int rows   = xkv_cu_attend_warps(a) * XKV_CU_ROWS;
        const int halves = XKV_CU_STEP * XKV_CU_LD_K > XKV_CU_PIECE * XKV_CU_LD_V ? XKV_CU_STEP * XKV_CU_LD_K : XKV_CU_PIECE * XKV_CU_LD_V;
        q                = at.take<uint32_t>(rows * (a.dim[XKV_CU_K] + 8) / 2);
        panel            = at.take<uint32_t>(halves / 2);
        see              = at.take<int>(rows * 2);
        out              = at.take<int>(rows);
    }
};

struct xkv_cu_attend_block {
    const xkv_cu_attn &          a;
    const xkv_cu_prefill &       b;
    const xkv_cu_attend_shared & c;

    int  s, head, piece, j0, n; // queries of the KV head
    int  first, n_token;        // of the batch
    bool stored;

    __device__ int n_row() const { return xkv_cu_n_warp() * XKV_CU_ROWS; }
    __device__ int query(int i) const { return head * a.n_tps * a.n_gqa + j0 + i; }
    __device__ int token_of(int i) const { return (j0 + i) / a.n_gqa; }

    __device__ float * dst(int i) const { return a.dst + ((size_t) s * b.n_query + c.out[i]) * a.dim[XKV_CU_V] + piece * XKV_CU_PIECE; }

    __device__ void load_queries() const {
        const int dk = a.dim[XKV_CU_K];
        for (int i = xkv_cu_warp(); i < n_row(); i += xkv_cu_n_warp()) {
            const int     out = xkv_cu_find_query(a, query(min(i, n - 1))).out;
            const float * x   = xkv_cu_query_row(a, out, s);
            for (int d = 2 * xkv_cu_lane(); d < dk; d += 2 * XKV_CU_WARP) {
                c.q[(i * (dk + 8) + d) / 2] = i < n ? xkv_cu_pack_half(x[d] * a.scale, x[d + 1] * a.scale) : 0;
            }
            if (xkv_cu_lane() == 0) {
                c.out[i] = out;
            }
        }
    }

    // whether any query sees tokens of the step; of stored ones, how many
    __device__ bool find_seen(int t0) const {
        bool any = false;
        if (stored) {
            for (int e = threadIdx.x; e < 2 * n_row(); e += blockDim.x) {
                const int i  = e / 2;
                const int at = first + t0 + e % 2 * 32;
                int       to = 0;
                if (i < n && t0 + e % 2 * 32 < n_token) {
                    to = min(max(xkv_cu_n_fill(a, at / a.n_chunk, token_of(i), s) - at % a.n_chunk, 0), 32);
                }
                c.see[e] = to;
                any      = any || to > 0;
            }
        } else {
            for (int e = threadIdx.x; e < n * XKV_CU_STEP; e += blockDim.x) {
                const int t = t0 + e % XKV_CU_STEP;
                any         = any || (t < n_token && xkv_cu_mask_at(a, first + t, token_of(e / XKV_CU_STEP), s) > -INFINITY);
            }
        }
        return __syncthreads_or(any);
    }

    // what is added to a score
    __device__ float bias(int i, int t0, int t) const {
        if (stored) {
            return t % 32 < c.see[2 * i + t / 32] ? 0.0f : -INFINITY;
        }
        return i < n && t0 + t < n_token ? xkv_cu_mask_at(a, first + t0 + t, token_of(i), s) : -INFINITY;
    }

    // rows of n_col halves, from bytes that are 16 to a piece
    __device__ void load(const half * from, size_t step, int n_row, int n_col, int ld) const {
        for (int e = threadIdx.x; e < n_row * n_col / 8; e += blockDim.x) {
            const int row = e / (n_col / 8);
            const int col = e % (n_col / 8) * 8;

            *(uint4 *) (c.panel + (row * ld + col) / 2) = *(const uint4 *) (from + row * step + col);
        }
    }

    // products of the warp's queries and a step of K
    __device__ void multiply_keys(int t0, float (&x)[XKV_CU_STEP / 8][4]) const {
        const int dk = a.dim[XKV_CU_K];
        const int r  = xkv_cu_lane() / 4;
        const int j  = xkv_cu_lane() % 4;
        for (int d0 = 0; d0 < dk; d0 += XKV_CU_DEPTH) {
            const int depth = min(XKV_CU_DEPTH, dk - d0);
            load(b.k + ((size_t) head * XKV_CU_BATCH + t0) * dk + d0, dk, XKV_CU_STEP, depth, XKV_CU_LD_K);
            __syncthreads();
            for (int k = 0; k < depth / 2; k += 8) {
                uint32_t y[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    y[i] = c.q[((xkv_cu_warp() * XKV_CU_ROWS + r + i % 2 * 8) * (dk + 8) + d0) / 2 + k + j + i / 2 * 4];
                }
#pragma unroll
                for (int t = 0; t < XKV_CU_STEP / 8; ++t) {
                    const uint32_t * p    = c.panel + (8 * t + r) * XKV_CU_LD_K / 2 + k + j;
                    const uint32_t   z[2] = { p[0], p[4] };
                    xkv_cu_mma_f16(x[t], y, z);
                }
            }
            __syncthreads();
        }
    }

    // adds a step of V with these weights
    __device__ void add_values(int t0, const float (&x)[XKV_CU_STEP / 8][4], float (&acc)[XKV_CU_PIECE / 8][4]) const {
        const int dv = a.dim[XKV_CU_V];
        const int d0 = piece * XKV_CU_PIECE;
        const int w  = min(XKV_CU_PIECE, dv - d0);
        load(b.v + ((size_t) head * dv + d0) * XKV_CU_BATCH + t0, XKV_CU_BATCH, w, XKV_CU_STEP, XKV_CU_LD_V);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < XKV_CU_STEP / 16; ++k) {
            uint32_t y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                y[i] = xkv_cu_pack_half(x[2 * k + i / 2][i % 2 * 2], x[2 * k + i / 2][i % 2 * 2 + 1]);
            }
#pragma unroll
            for (int d = 0; d < XKV_CU_PIECE / 8; ++d) {
                if (8 * d < w) {
                    const uint32_t * p    = c.panel + (8 * d + xkv_cu_lane() / 4) * XKV_CU_LD_V / 2 + 8 * k + xkv_cu_lane() % 4;
                    const uint32_t   z[2] = { p[0], p[4] };
                    xkv_cu_mma_f16(acc[d], y, z);
                }
            }
        }
    }
};

// grid: queries of a KV head, KV head, piece of V
static __global__ void __launch_bounds__(4 * XKV_CU_WARP, 3)
    xkv_cu_attend(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first, int n_token, bool stored) {
    XKV_DYNAMIC_SHARED(shared);
    xkv_cu_arena               arena = { (char *) shared };
    const xkv_cu_attend_shared c(a, arena);
    const int                  j0 = blockIdx.x * xkv_cu_n_warp() * XKV_CU_ROWS;
    const int                  n  = min(xkv_cu_n_warp() * XKV_CU_ROWS, a.n_tps * a.n_gqa - j0);
    const xkv_cu_attend_block  block{ a, b, c, s, (int) blockIdx.y, (int) blockIdx.z, j0, n, first, n_token, stored };

    const int w  = min(XKV_CU_PIECE, a.dim[XKV_CU_V] - block.piece * XKV_CU_PIECE);
    const int i0 = xkv_cu_warp() * XKV_CU_ROWS + xkv_cu_lane() / 4; // of the thread's two queries, i0 and i0 + 8

    float  acc[XKV_CU_PIECE / 8][4] = {};
    float2 state[2];
    block.load_queries();
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = i0 + 8 * h;
        state[h]    = i < n ? b.state[(size_t) block.piece * b.n_query + block.query(i)] : make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int d = 0; d < XKV_CU_PIECE / 8; ++d) {
            if (state[h].y != 0.0f && 8 * d < w) {
                const float * o   = block.dst(i) + 8 * d + xkv_cu_lane() % 4 * 2;
                acc[d][2 * h]     = o[0];
                acc[d][2 * h + 1] = o[1];
            }
        }
    }
    for (int t0 = 0; t0 < n_token; t0 += XKV_CU_STEP) {
        if (!block.find_seen(t0)) {
            continue;
        }
        float x[XKV_CU_STEP / 8][4] = {};
        block.multiply_keys(t0, x);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float max = state[h].x;
#pragma unroll
            for (int t = 0; t < XKV_CU_STEP / 8; ++t) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &     y    = x[t][2 * h + e];
                    const float bias = block.bias(i0 + 8 * h, t0, 8 * t + xkv_cu_lane() % 4 * 2 + e);
                    y                = bias == -INFINITY ? -INFINITY : xkv_cu_cap(a, y) + bias;
                    max              = fmaxf(max, y);
                }
            }
            max       = fmaxf(max, __shfl_xor_sync(XKV_CU_ALL, max, 1));
            max       = fmaxf(max, __shfl_xor_sync(XKV_CU_ALL, max, 2));
            float sum = 0.0f;
#pragma unroll
            for (int t = 0; t < XKV_CU_STEP / 8; ++t) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float & y = x[t][2 * h + e];
                    y         = y == -INFINITY ? 0.0f : expf(y - max);
                    sum += y;
                }
            }
            sum += __shfl_xor_sync(XKV_CU_ALL, sum, 1);
            sum += __shfl_xor_sync(XKV_CU_ALL, sum, 2);
            const float f = state[h].x == -INFINITY ? 1.0f : expf(state[h].x - max); // sums are 0 or no numbers then
            state[h]      = make_float2(max, state[h].y * f + sum);
#pragma unroll
            for (int d = 0; d < XKV_CU_PIECE / 8; ++d) {
                acc[d][2 * h] *= f;
                acc[d][2 * h + 1] *= f;
            }
        }
        block.add_values(t0, x, acc);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int i = i0 + 8 * h;
        if (i >= n) {
            break;
        }
        if (xkv_cu_lane() % 4 == 0) {
            b.state[(size_t) block.piece * b.n_query + block.query(i)] = state[h];
        }
#pragma unroll
        for (int d = 0; d < XKV_CU_PIECE / 8; ++d) {
            if (8 * d < w) {
                float * o = block.dst(i) + 8 * d + xkv_cu_lane() % 4 * 2;
                o[0]      = acc[d][2 * h];
                o[1]      = acc[d][2 * h + 1];
            }
        }
    }
}
