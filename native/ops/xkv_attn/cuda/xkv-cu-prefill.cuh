// Many queries on CUDA: K and V of a batch of tokens are made for all KV heads as f32, meet all queries and are forgotten. A query
// keeps a running max and sum, and its output is where the sums are.

#pragma once

#include "xkv-cu-exact.cuh"

#define XKV_CU_BATCH 512 // tokens
#define XKV_CU_ROWS  32  // queries of a KV head, or tokens, of a block of threads
#define XKV_CU_COLS  128 // tokens, or numbers of a head, that a block multiplies them with at a time
#define XKV_CU_DEPTH 16  // numbers that are summed from one load of shared memory
#define XKV_CU_SPAN  256 // tokens whose scores a block has at a time

// sums of a thread: rows 4w to 4w + 3 of warp w, columns lane + 32i
#define XKV_CU_OWN 4

struct xkv_cu_prefill {
    float *  k;     // [KV head][XKV_CU_BATCH][d_k]
    float *  v;     // [KV head][XKV_CU_BATCH][d_v]
    float2 * state; // [query] max and sum of weights
};

// [XKV_CU_DEPTH][rows + 1] and [XKV_CU_DEPTH][columns + 1]
struct xkv_cu_panels {
    float * a;
    float * b;

    static const int lda = XKV_CU_ROWS + 1;
    static const int ldb = XKV_CU_COLS + 1;

    __host__ __device__ explicit xkv_cu_panels(xkv_cu_arena & at) {
        a = at.take<float>(XKV_CU_DEPTH * lda);
        b = at.take<float>(XKV_CU_DEPTH * ldb);
    }

    // acc += a^T b
    __device__ void multiply(float (&acc)[XKV_CU_OWN][XKV_CU_OWN]) const {
#pragma unroll
        for (int e = 0; e < XKV_CU_DEPTH; ++e) {
            float x[XKV_CU_OWN], y[XKV_CU_OWN];
#pragma unroll
            for (int i = 0; i < XKV_CU_OWN; ++i) {
                x[i] = a[e * lda + xkv_cu_warp() * XKV_CU_OWN + i];
                y[i] = b[e * ldb + xkv_cu_lane() + XKV_CU_WARP * i];
            }
#pragma unroll
            for (int i = 0; i < XKV_CU_OWN; ++i) {
#pragma unroll
                for (int k = 0; k < XKV_CU_OWN; ++k) {
                    acc[i][k] += x[i] * y[k];
                }
            }
        }
    }
};

// Directions [r0, r0 + XKV_CU_DEPTH) of entries [first, first + n) to a panel, 0 past limit. Directions are the rows of the matrix
// of n_col columns, or its columns.
static __device__ void xkv_cu_load_panel(int type, const uint8_t * tiles, int n_col, bool by_row, int r0, int first, int n, int limit,
                                         float * panel, int ld) {
    for (int e = threadIdx.x; e < n * XKV_CU_DEPTH / 4; e += blockDim.x) {
        const int r = by_row ? e % XKV_CU_DEPTH : e % (XKV_CU_DEPTH / 4) * 4;
        const int x = by_row ? e / XKV_CU_DEPTH * 4 : e / (XKV_CU_DEPTH / 4);
        float4    z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first + x < limit) {
            z = by_row ? xkv_cu_four_at(type, tiles, n_col, r0 + r, first + x) : xkv_cu_four_at(type, tiles, n_col, first + x, r0 + r);
        }
        float *   p    = panel + r * ld + x;
        const int step = by_row ? 1 : ld;
        p[0]           = z.x;
        p[step]        = z.y;
        p[2 * step]    = z.z;
        p[3 * step]    = z.w;
    }
}

// whether any query of the batch sees token t of a chunk or one after it
static __device__ bool xkv_cu_seen(const xkv_cu_attn & a, int ic, int t, int s) {
    bool any = false;
    for (int i = threadIdx.x; i < a.n_tps; i += blockDim.x) {
        any = any || xkv_cu_n_fill(a, ic, i, s) > t;
    }
    return __syncthreads_or(any);
}

// K or V of XKV_CU_ROWS stored tokens; grid: tokens from first on, numbers of a head, 2 * KV head + kind
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_make(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first) {
    XKV_DYNAMIC_SHARED(shared);
    const int kd   = blockIdx.z % 2;
    const int head = blockIdx.z / 2;
    const int dim  = a.dim[kd];
    const int d0   = blockIdx.y * XKV_CU_COLS;
    const int slot = blockIdx.x * XKV_CU_ROWS; // in the batch
    const int ic   = (first + slot) / a.n_chunk;
    const int t0   = (first + slot) % a.n_chunk;
    if (d0 >= dim) {
        return;
    }
    float *         res  = (kd == XKV_CU_K ? b.k : b.v) + ((size_t) head * XKV_CU_BATCH + slot) * dim;
    const uint8_t * coef = a.coef + ic * a.nb_coef[0] + s * a.nb_coef[1] + (a.plain ? head * a.head_coef[kd] : 0);
    if (!xkv_cu_seen(a, ic, t0, s)) {
        // weights of V are 0, so it has to be a number
        for (int e = threadIdx.x; e < XKV_CU_ROWS * XKV_CU_COLS && kd == XKV_CU_V; e += blockDim.x) {
            if (d0 + e % XKV_CU_COLS < dim) {
                res[e / XKV_CU_COLS * dim + d0 + e % XKV_CU_COLS] = 0.0f;
            }
        }
        return;
    }
    if (a.plain) {
        for (int e = threadIdx.x; e < XKV_CU_ROWS * XKV_CU_COLS; e += blockDim.x) {
            const int t = e / XKV_CU_COLS;
            const int d = d0 + e % XKV_CU_COLS;
            if (d < dim) {
                int is = 0;
                while (d >= a.segments[kd][is].first + a.segments[kd][is].rank) {
                    ++is;
                }
                const xkv_cu_segment & seg = a.segments[kd][is];
                const int              row = kd == XKV_CU_K ? t0 + t : d - seg.first;
                const int              col = kd == XKV_CU_K ? d - seg.first : t0 + t;
                const int              n   = kd == XKV_CU_K ? seg.rank : a.n_chunk;
                const float4           x   = xkv_cu_four_at(seg.type, coef + seg.coef, n, row, col / 4 * 4);
                res[t * dim + d]           = col % 4 == 0 ? x.x : col % 4 == 1 ? x.y : col % 4 == 2 ? x.z : x.w;
            }
        }
        return;
    }
    xkv_cu_arena        arena = { (char *) shared };
    const xkv_cu_panels p(arena);
    float               acc[XKV_CU_OWN][XKV_CU_OWN] = {};
    for (int is = 0; is < a.n_segment[kd]; ++is) {
        const xkv_cu_segment & seg  = a.segments[kd][is];
        const uint8_t *        base = a.basis + a.kind_basis[kd] + head * a.head_basis[kd] + seg.basis;
        for (int r = 0; r < seg.rank; r += XKV_CU_DEPTH) {
            const bool k = kd == XKV_CU_K;
            xkv_cu_load_panel(seg.type, coef + seg.coef, k ? seg.rank : a.n_chunk, !k, r, t0, XKV_CU_ROWS, a.n_chunk, p.a, p.lda);
            xkv_cu_load_panel(seg.type_basis, base, k ? dim : seg.rank, k, r, d0, XKV_CU_COLS, dim, p.b, p.ldb);
            __syncthreads();
            p.multiply(acc);
            __syncthreads();
        }
    }
#pragma unroll
    for (int i = 0; i < XKV_CU_OWN; ++i) {
#pragma unroll
        for (int k = 0; k < XKV_CU_OWN; ++k) {
            const int d = d0 + xkv_cu_lane() + XKV_CU_WARP * k;
            if (d < dim) {
                res[(xkv_cu_warp() * XKV_CU_OWN + i) * dim + d] = acc[i][k];
            }
        }
    }
}

// stored K with its mean, turned back from its chunk's frame; grid: tokens from first on, KV head
static __global__ void xkv_cu_turn_back(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first) {
    const int     head  = blockIdx.y;
    const int     dk    = a.dim[XKV_CU_K];
    const int     ic    = (first + blockIdx.x) / a.n_chunk;
    float *       x     = b.k + ((size_t) head * XKV_CU_BATCH + blockIdx.x) * dk;
    const float * mean  = a.mean + head * dk;
    const float * c     = (const float *) (a.turn + ((size_t) s * a.n_frame + ic) * a.nb_turn);
    const int     pairs = a.n_rot / 2;
    for (int i = threadIdx.x; i < dk - pairs; i += blockDim.x) {
        if (i < pairs) {
            const int   r0 = a.neox ? i : 2 * i;
            const int   r1 = a.neox ? i + pairs : 2 * i + 1;
            const int   d0 = a.rot_first + r0;
            const int   d1 = a.rot_first + r1;
            const float y0 = x[d0] + mean[d0];
            const float y1 = x[d1] + mean[d1];
            x[d0]          = y0 * c[r0] + y1 * c[r1];
            x[d1]          = y1 * c[r0] - y0 * c[r1];
        } else {
            const int k = i - pairs; // of the numbers that are not turned
            const int d = k < a.rot_first ? k : k + a.n_rot;
            x[d] += mean[d];
        }
    }
}

// exact tokens as f32; grid: tokens from first on, KV head
static __global__ void xkv_cu_load_exact(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first) {
    const int head = blockIdx.y;
    for (int kd = 0; kd < 2; ++kd) {
        const char * row = xkv_cu_exact_row(a.exact[kd], first + blockIdx.x, head, s);
        float *      res = (kd == XKV_CU_K ? b.k : b.v) + ((size_t) head * XKV_CU_BATCH + blockIdx.x) * a.dim[kd];
        for (int d = threadIdx.x; d < a.dim[kd]; d += blockDim.x) {
            res[d] = xkv_cu_exact_at(a.exact[kd], row, d);
        }
    }
}

static __global__ void xkv_cu_begin(const xkv_cu_prefill b, int n_query) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < n_query) {
        b.state[j] = make_float2(-INFINITY, 0.0f);
    }
}

// grid: query
static __global__ void xkv_cu_end(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s) {
    const float sum = b.state[blockIdx.x].y;
    float *     o   = a.dst + ((size_t) s * a.n_head * a.n_tps + xkv_cu_find_query(a, blockIdx.x).out) * a.dim[XKV_CU_V];
    for (int d = threadIdx.x; d < a.dim[XKV_CU_V]; d += blockDim.x) {
        o[d] = sum > 0.0f ? o[d] / sum : 0.0f;
    }
}
