// Decoding on CUDA, second pass, over a span of chunks: which pairs of a chunk and a query have blocks to refine; these queries
// through all of the basis of K, by KV head and whatever their chunks are, so that the basis is read once for 32 of them; scores of
// their blocks, chunk by chunk, so that coefficients are read once for all queries.

#pragma once

#include "xkv-cu-decode.cuh"

#define XKV_CU_LIST_THREADS 512
#define XKV_CU_STRIPS       16 // of 32 directions, that a block of threads goes through with the queries it has turned

// grid: KV head, stream; span: first chunk and end
static __global__ void xkv_cu_mark(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int first, int end) {
    XKV_DYNAMIC_SHARED(shared);
    xkv_cu_arena arena = { (char *) shared };
    int *        count = arena.take<int>(1);
    const int    s     = blockIdx.y;
    const int    m     = a.n_tps * a.n_gqa;
    const int    n     = end - first;
    int *        list  = b.list + ((size_t) s * a.n_head_kv + blockIdx.x) * m * b.n_span;
    if (threadIdx.x == 0) {
        *count = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < m * n; i += blockDim.x) {
        const int     j     = blockIdx.x * m + i / n;
        const int     ic    = first + i % n;
        const float   least = b.least[(size_t) s * b.n_query + j].y;
        const float * share = b.shares(a, s, ic, j);
        uint32_t      fine  = 0;
        for (int f = 0; f < xkv_cu_n_fine(a); ++f) {
            fine |= (uint32_t) (share[f] > least) << f;
        }
        const size_t row = b.row(s, i % n, j);
        b.fine[row]      = fine;
        if (fine) {
            list[atomicAdd(count, 1)] = (i % n) * b.n_query + j;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        b.count[s * a.n_head_kv + blockIdx.x] = *count;
    }
}

// A piece of work is 32 rows of the list of a KV head and some strips of directions; a block takes every gridDim.x-th. grid: blocks
// of threads, KV head, stream
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_project_list(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int first) {
    XKV_DYNAMIC_SHARED(shared);
    const int    head    = blockIdx.y;
    const int    s       = blockIdx.z;
    const int    m       = a.n_tps * a.n_gqa;
    const int    rank    = a.rank[XKV_CU_K];
    const int    n_strip = xkv_cu_n_strip(a, XKV_CU_K, 0, rank, XKV_CU_ROUND);
    const int    n_part  = (n_strip + XKV_CU_STRIPS - 1) / XKV_CU_STRIPS;
    const int    n       = b.count[s * a.n_head_kv + head];
    const int *  list    = b.list + ((size_t) s * a.n_head_kv + head) * m * b.n_span;
    xkv_cu_arena arena   = { (char *) shared };
    xkv_cu_rows  q;
    q.take(arena, XKV_CU_TILE, xkv_cu_rows::width(a.dim[XKV_CU_K]), a.basis_ints[XKV_CU_K], a.basis_floats[XKV_CU_K]);

    for (int item = blockIdx.x; item < (n + XKV_CU_TILE - 1) / XKV_CU_TILE * n_part; item += gridDim.x) {
        const int i0    = item / n_part * XKV_CU_TILE;
        const int n_col = min(n - i0, XKV_CU_TILE);
        for (int i = xkv_cu_warp(); i < n_col; i += xkv_cu_n_warp()) {
            const int   row  = list[i0 + i];
            const float mean = xkv_cu_turn(a, first + row / b.n_query, s, row % b.n_query, q, i);
            if (xkv_cu_lane() == 0 && item % n_part == 0) {
                b.top[(size_t) s * b.n_span * b.n_query + row] = mean; // until there are scores
            }
        }
        __syncthreads();
        const auto from   = xkv_cu_columns<XKV_CU_G>(n_col, [](int c) { return c; });
        const auto row_of = [&](int c) { return s * b.n_span * b.n_query + list[i0 + c]; };
        const int  k0     = item % n_part * XKV_CU_STRIPS;
        for (int k = k0 + xkv_cu_warp(); k < min(n_strip, k0 + XKV_CU_STRIPS); k += xkv_cu_n_warp()) {
            const xkv_cu_strip strip = xkv_cu_find_strip(a, XKV_CU_K, 0, rank, XKV_CU_ROUND, k);
            xkv_cu_project(a, head, strip, q, from, b.y, n_col, row_of, a.segments[XKV_CU_K][strip.segment].first + strip.first);
        }
        __syncthreads();
    }
}

struct xkv_cu_refine_block {
    const xkv_cu_attn &   a;
    const xkv_cu_decode & b;

    int s, j0, n;

    // shared by the block
    float *    score; // [n][ld] of the queries that have blocks in the chunk, in their order
    float *    rough; // the same by the lead
    int *      query; // of them
    int *      fill;
    uint32_t * fine;
    int *      n_own; // how many they are
    float *    max;   // [n] of each query
    float *    sum;

    __host__ __device__ xkv_cu_refine_block(const xkv_cu_attn & a, const xkv_cu_decode & b, int s, int j0, int n, xkv_cu_arena & at) :
        a(a), b(b), s(s), j0(j0), n(n) {
        score = at.take<float>(n * ld());
        rough = at.take<float>(n * ld());
        query = at.take<int>(n);
        fill  = at.take<int>(n);
        fine  = at.take<uint32_t>(n);
        n_own = at.take<int>(1);
        max   = at.take<float>(n);
        sum   = at.take<float>(n);
    }

    __host__ __device__ int ld() const { return a.n_chunk + 4; }

    // by a warp: queries with blocks in a chunk, the i-th of the span
    __device__ void find(int ic, int i) const {
        int done = 0;
        for (int k0 = 0; k0 < n; k0 += XKV_CU_WARP) {
            const int      k    = k0 + xkv_cu_lane();
            const uint32_t bits = k < n ? b.fine[b.row(s, i, j0 + k)] : 0;
            const uint32_t some = __ballot_sync(XKV_CU_ALL, bits != 0);
            if (bits) {
                const int at = done + __popc(some & ((1u << xkv_cu_lane()) - 1));
                query[at]    = k;
                fine[at]     = bits;
                fill[at]     = xkv_cu_n_fill(a, ic, xkv_cu_find_query(a, j0 + k).token, s);
            }
            done += __popc(some);
        }
        if (xkv_cu_lane() == 0) {
            *n_own = done;
        }
    }

    // scores by the lead of all tokens, since blocks that are not refined were rounded with others, and by all directions
    __device__ void add_scores(int ic, int i) const {
        const int  n_col = *n_own;
        const int  first = (int) b.row(s, i, j0);
        const auto group = xkv_cu_columns<XKV_CU_G>(n_col, [=, of = query](int c) { return first + of[c]; });
        for (int t = xkv_cu_warp() * 16; t < a.n_chunk; t += xkv_cu_n_warp() * 16) {
            float acc[XKV_CU_G][4] = {};
            bool  any              = false;
            bool  see              = false;
            for (int c = xkv_cu_lane(); c < n_col; c += XKV_CU_WARP) {
                any = any || (fine[c] >> t / XKV_CU_FINE & 1);
                see = see || t < fill[c];
            }
            if (!__any_sync(XKV_CU_ALL, see)) {
                continue;
            }
            xkv_cu_add_scores(a, ic, s, 0, t, 0, a.lead[XKV_CU_K], b.y, 0, group, acc);
            store(rough, i, t, n_col, acc);
            if (__any_sync(XKV_CU_ALL, any)) {
                xkv_cu_add_scores(a, ic, s, 0, t, a.lead[XKV_CU_K], a.rank[XKV_CU_K], b.y, a.lead[XKV_CU_K], group, acc);
                store(score, i, t, n_col, acc);
            }
        }
    }

    __device__ void store(float * to, int i, int t, int n_col, const float (&acc)[XKV_CU_G][4]) const {
#pragma unroll
        for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = 8 * g + xkv_cu_lane() % 4 * 2 + e % 2;
                if (c < n_col) {
                    const float mean = b.top[b.row(s, i, j0 + query[c])];

                    to[c * ld() + t + xkv_cu_lane() / 4 + e / 2 * 8] = xkv_cu_cap(a, mean + acc[g][e]);
                }
            }
        }
    }

    // By a warp: weights of blocks of the c-th of the queries, and those by the lead, rounded as they were when they were added.
    __device__ void weigh(int ic, int i, int c) const {
        const int      k     = query[c];
        const size_t   row   = b.row(s, i, j0 + k);
        const uint32_t bits  = fine[c];
        const int      t0    = 4 * xkv_cu_lane();
        const float *  x     = score + c * ld();
        const float *  y     = rough + c * ld();
        float *        share = b.shares(a, s, ic, j0 + k);
        const float    old   = max[k];
        float          top   = old;
        for (int t = t0; t < a.n_chunk; t += 4 * XKV_CU_WARP) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (t + e < fill[c] && (bits >> t / XKV_CU_FINE & 1)) {
                    top = fmaxf(top, x[t + e]);
                }
            }
        }
        top        = xkv_cu_max(top);
        float more = 0.0f;
        for (int t = t0; t - t0 < a.n_chunk; t += 4 * XKV_CU_WARP) {
            const bool on = t < a.n_chunk && (bits >> t / XKV_CU_FINE & 1);
            float      p[4], r[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const bool see = t < a.n_chunk && t + e < fill[c];
                r[e]           = see ? expf(y[t + e] - top) : 0.0f;
                p[e]           = see && on ? expf(x[t + e] - top) : 0.0f;
                more += on ? p[e] - r[e] : 0.0f;
            }
            xkv_cu_round(b.fresh, row, t, make_float4(p[0], p[1], p[2], p[3]), t < a.n_chunk);
            xkv_cu_round(b.taken, row, t, make_float4(r[0], r[1], r[2], r[3]), t < a.n_chunk, on, -1.0f);
            if (on && t % XKV_CU_FINE == 0) {
                share[t / XKV_CU_FINE] = -INFINITY;
            }
        }
        more = xkv_cu_sum(more);
        if (xkv_cu_lane() == 0) {
            max[k]     = top;
            sum[k]     = sum[k] * xkv_cu_rescale(old, top) + more;
            b.top[row] = top;
        }
    }
};

// grid: split, tile of queries, stream; span: first chunk and end
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_refine(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int n_most, int first, int end) {
    XKV_DYNAMIC_SHARED(shared);
    const int j0    = blockIdx.y * n_most;
    const int split = blockIdx.x;

    xkv_cu_arena              arena = { (char *) shared };
    const xkv_cu_refine_block c(a, b, blockIdx.z, j0, min(n_most, b.n_query - j0), arena);
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        const float2 state = b.state[b.part(c.s, split, j0 + i)];
        c.max[i]           = state.x;
        c.sum[i]           = state.y;
    }
    const int skip = (first - split + b.n_split - 1) / b.n_split;
    for (int ic = split + max(skip, 0) * b.n_split; ic < end; ic += b.n_split) {
        __syncthreads();
        if (xkv_cu_warp() == 0) {
            c.find(ic, ic - first);
        }
        __syncthreads();
        if (*c.n_own == 0) {
            continue;
        }
        c.add_scores(ic, ic - first);
        __syncthreads();
        for (int i = xkv_cu_warp(); i < *c.n_own; i += xkv_cu_n_warp()) {
            c.weigh(ic, ic - first, i);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        b.state[b.part(c.s, split, j0 + i)] = make_float2(c.max[i], c.sum[i]);
    }
}
