// Decoding on CUDA, first pass: all stored tokens by the lead. A block of threads has some queries and the chunks of a split, a few
// chunks at a time so that the basis is read once for all of them.

#pragma once

#include "xkv-cu-decode.cuh"

struct xkv_cu_lead_block {
    const xkv_cu_attn &   a;
    const xkv_cu_decode & b;

    int s, j0, n, n_chunk; // n_chunk: that go together

    // shared by the block; row k * n + i is of query i and the k-th chunk
    xkv_cu_rows y;
    xkv_cu_rows q;
    xkv_cu_rows w;     // [n] weights of a chunk's tokens
    float *     score; // [n][ld]
    float *     first; // by row: the score's part of the mean of K
    int *       fill;  // by row
    float *     max;   // [n]
    float *     sum;
    float *     factor; // of the sums so far

    // Queries are done with when scores begin, if the lead is one slice: they have the same memory then.
    __host__ __device__ xkv_cu_lead_block(const xkv_cu_attn & a, const xkv_cu_decode & b, int s, int j0, int n, int n_chunk,
                                          xkv_cu_arena & at) : a(a), b(b), s(s), j0(j0), n(n), n_chunk(n_chunk) {
        max    = at.take<float>(n);
        sum    = at.take<float>(n);
        factor = at.take<float>(n);
        first  = at.take<float>(n_chunk * n);
        fill   = at.take<int>(n_chunk * n);
        if (!a.plain) {
            y.take(at, n_chunk * n, XKV_CU_SLICE, a.coef_ints[XKV_CU_K], a.coef_floats[XKV_CU_K]);
        }
        xkv_cu_arena same = at;
        same.guarded = at.guarded = !one_slice(a);
        q.take(at, n_chunk * n, xkv_cu_rows::width(a.dim[XKV_CU_K]), ints_q(a), floats_q(a));
        xkv_cu_arena & next = one_slice(a) ? same : at;
        score               = next.take<float>(n * ld());
        w.take(next, n, a.n_chunk, a.coef_ints[XKV_CU_V], a.coef_floats[XKV_CU_V]);
        at.at      = at.at > next.at ? at.at : next.at;
        at.guarded = true;
        at.guard();
        if (a.plain) {
            y = q;
        }
    }

    __host__ __device__ static bool one_slice(const xkv_cu_attn & a) { return !a.plain && a.lead[XKV_CU_K] <= XKV_CU_SLICE; }
    __host__ __device__ static bool ints_q(const xkv_cu_attn & a) { return (a.plain ? a.coef_ints : a.basis_ints)[XKV_CU_K]; }
    __host__ __device__ static bool floats_q(const xkv_cu_attn & a) { return (a.plain ? a.coef_floats : a.basis_floats)[XKV_CU_K]; }

    // scores of a query: 8 numbers of 4 queries are in different banks
    __host__ __device__ int ld() const { return a.n_chunk + 4; }

    __device__ int most_fill(int k) const {
        int most = 0;
        for (int i = xkv_cu_lane(); i < n; i += XKV_CU_WARP) {
            most = ::max(most, fill[k * n + i]);
        }
        return xkv_cu_max(most);
    }

    // KV heads of the block, the queries of one, and 32 of them at a time
    __device__ int m() const { return a.n_tps * a.n_gqa; }
    __device__ int heads_from() const { return j0 / m(); }
    __device__ int n_head() const { return (j0 + n - 1) / m() - heads_from() + 1; }
    __device__ int begin_of(int head) const { return ::max(j0, head * m()) - j0; }
    __device__ int end_of(int head) const { return ::min(j0 + n, (head + 1) * m()) - j0; }

    // false where no query sees any of these chunks
    __device__ bool load_fill(int ic0) const {
        bool any = false;
        for (int i = threadIdx.x; i < n_chunk * n; i += blockDim.x) {
            const int ic = ic0 + i / n * b.n_split;
            fill[i]      = ic < a.n_frame ? xkv_cu_n_fill(a, ic, xkv_cu_find_query(a, j0 + i % n).token, s) : 0;
            any          = any || fill[i] > 0;
        }
        return __syncthreads_or(any);
    }

    __device__ void turn(int ic0) const {
        for (int i = xkv_cu_warp(); i < n_chunk * n; i += xkv_cu_n_warp()) {
            if (fill[i] > 0) {
                const float x = xkv_cu_turn(a, ic0 + i / n * b.n_split, s, j0 + i % n, q, i);
                if (xkv_cu_lane() == 0) {
                    first[i] = x;
                }
            }
        }
    }

    // all rows of a KV head through directions [d0, d1)
    __device__ void project(int d0, int d1) const {
        const int n_strip = xkv_cu_n_strip(a, XKV_CU_K, d0, d1, XKV_CU_ROUND);
        const int n_pack  = (::min(m(), n) * n_chunk + XKV_CU_TILE / 2 - 1) / (XKV_CU_TILE / 2);
        for (int item = xkv_cu_warp(); item < n_head() * n_pack * n_strip; item += xkv_cu_n_warp()) {
            const int head  = heads_from() + item / (n_pack * n_strip);
            const int from  = item / n_strip % n_pack * (XKV_CU_TILE / 2);
            const int i0    = begin_of(head);
            const int own   = end_of(head) - i0;
            const int n_col = ::min(own * n_chunk - from, XKV_CU_TILE / 2);
            if (n_col <= 0) {
                continue;
            }
            const auto         row_of = [&](int c) { return (from + c) / own * n + i0 + (from + c) % own; };
            const auto         group  = xkv_cu_columns<XKV_CU_G / 2>(n_col, row_of);
            const xkv_cu_strip strip  = xkv_cu_find_strip(a, XKV_CU_K, d0, d1, XKV_CU_ROUND, item % n_strip);
            xkv_cu_project(a, head, strip, q, group, y, n_col, row_of, a.segments[XKV_CU_K][strip.segment].first + strip.first - d0);
        }
    }

    // adds directions [d0, d1) to the scores of the k-th chunk, which begin with that of the mean
    __device__ void add_scores(int ic, int k, int d0, int d1, bool begin) const {
        const int n_tile = (most_fill(k) + 15) / 16;
        const int n_pack = a.plain ? (::min(m(), n) + XKV_CU_TILE - 1) / XKV_CU_TILE : 1;
        const int n_unit = a.plain ? n_head() * n_pack : 1;
        for (int item = xkv_cu_warp(); item < n_unit * n_tile; item += xkv_cu_n_warp()) {
            const int t     = item % n_tile * 16;
            const int head  = heads_from() + item / n_tile / n_pack;
            const int i0    = a.plain ? begin_of(head) + item / n_tile % n_pack * XKV_CU_TILE : 0;
            const int n_col = ::min((a.plain ? end_of(head) : n) - i0, XKV_CU_TILE);
            if (n_col <= 0) {
                continue;
            }
            const auto group            = xkv_cu_columns<XKV_CU_G>(n_col, [=](int c) { return k * n + i0 + c; });
            float      acc[XKV_CU_G][4] = {};
            xkv_cu_add_scores(a, ic, s, head, t, d0, d1, y, a.plain ? d0 : 0, group, acc);
#pragma unroll
            for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = i0 + 8 * g + xkv_cu_lane() % 4 * 2 + e % 2;
                    if (i < i0 + n_col) {
                        float * x = score + i * ld() + t + xkv_cu_lane() / 4 + e / 2 * 8;
                        *x        = (begin ? first[k * n + i] : *x) + acc[g][e];
                    }
                }
            }
        }
    }

    // end of a slice that begins at direction d0: whole tiles of each segment's coefficients
    __device__ int slice_end(int d0, int limit) const {
        int end = d0;
        for (int is = 0; is < a.n_segment[XKV_CU_K]; ++is) {
            const xkv_cu_segment & seg  = a.segments[XKV_CU_K][is];
            const int              left = ::min(seg.first + seg.rank, limit) - end;
            const int              room = d0 + XKV_CU_SLICE - end;
            if (left > room) {
                return end + room / xkv_cu_cols(seg.type) * xkv_cu_cols(seg.type);
            }
            end += ::max(left, 0);
        }
        return end;
    }

    // by a warp: weights of a chunk's tokens for query i, and the shares of its blocks
    __device__ void weigh(int ic, int k, int i) const {
        const int   n_fill = fill[k * n + i];
        const int   t0     = 4 * xkv_cu_lane();
        float *     x      = score + i * ld();
        float *     share  = b.shares(a, s, ic, j0 + i);
        const float old    = max[i];
        float       top    = old;
        for (int t = t0; t < a.n_chunk; t += 4 * XKV_CU_WARP) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (t + e < n_fill) {
                    x[t + e] = xkv_cu_cap(a, x[t + e]);
                    top      = fmaxf(top, x[t + e]);
                }
            }
        }
        top         = xkv_cu_max(top);
        float total = 0.0f;
        for (int t = t0; t - t0 < a.n_chunk; t += 4 * XKV_CU_WARP) {
            float p[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                p[e] = t + e < n_fill ? expf(x[t + e] - top) : 0.0f;
            }
            float block = p[0] + p[1] + p[2] + p[3];
            total += block;
            block += __shfl_xor_sync(XKV_CU_ALL, block, 1);
            block += __shfl_xor_sync(XKV_CU_ALL, block, 2);
            if (t < a.n_chunk && t % XKV_CU_FINE == 0) {
                share[t / XKV_CU_FINE] = t < n_fill ? logf(block) + top : -INFINITY;
            }
            xkv_cu_round(w, i, t, make_float4(p[0], p[1], p[2], p[3]), t < a.n_chunk);
        }
        total = xkv_cu_sum(total);
        if (xkv_cu_lane() == 0) {
            factor[i] = n_fill > 0 ? xkv_cu_rescale(old, top) : 1.0f;
            max[i]    = top;
            sum[i]    = sum[i] * factor[i] + total;
        }
    }

    // Adds V of a chunk to the sums of the split. They stay in the registers of a warp if it has no other directions.
    __device__ void add_values(int ic, int k, int split, bool stay, float (&acc)[XKV_CU_G][4]) const {
        const int n_tile = a.lead[XKV_CU_V] / 16;
        const int n_pack = a.plain ? (::min(m(), n) + XKV_CU_TILE - 1) / XKV_CU_TILE : 1;
        const int n_unit = a.plain ? n_head() * n_pack : 1;
        const int n_fill = most_fill(k);
        for (int item = xkv_cu_warp(); item < n_unit * n_tile; item += xkv_cu_n_warp()) {
            const int d     = item % n_tile * 16;
            const int head  = heads_from() + item / n_tile / n_pack;
            const int i0    = a.plain ? begin_of(head) + item / n_tile % n_pack * XKV_CU_TILE : 0;
            const int n_col = ::min((a.plain ? end_of(head) : n) - i0, XKV_CU_TILE);
            if (n_col <= 0) {
                continue;
            }
            const auto             group = xkv_cu_columns<XKV_CU_G>(n_col, [=](int c) { return i0 + c; });
            const xkv_cu_segment & seg   = a.segments[XKV_CU_V][xkv_cu_find_segment(a, XKV_CU_V, d)];
            const int              cols  = xkv_cu_cols(seg.type);
            const uint8_t *        tiles =
                xkv_cu_coef(a, ic, s, XKV_CU_V, seg, head) + (d - seg.first) / 16 * xkv_cu_rows_bytes(seg.type, a.n_chunk);
            if (!stay) {
                move_sums(split, d, i0, n_col, acc, false);
            }
#pragma unroll
            for (int g = 0; g < XKV_CU_G; ++g) {
                if (group.on >> g & 1) {
                    const float f0 = factor[group.c(g, 0)];
                    const float f1 = factor[group.c(g, 1)];
                    acc[g][0] *= f0;
                    acc[g][1] *= f1;
                    acc[g][2] *= f0;
                    acc[g][3] *= f1;
                }
            }
            xkv_cu_mul(seg.type, tiles, (n_fill + cols - 1) / cols * cols, w, 0, group, acc);
            if (!stay) {
                move_sums(split, d, i0, n_col, acc, true);
            }
        }
    }

    // by a warp: sums of 16 directions between registers and device memory
    __device__ void move_sums(int split, int d, int i0, int n_col, float (&acc)[XKV_CU_G][4], bool store) const {
#pragma unroll
        for (int g = 0; g < XKV_CU_G; ++g) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int c = 8 * g + xkv_cu_lane() % 4 * 2 + e % 2;
                if (c < n_col) {
                    float * x = b.sums + b.part(s, split, j0 + i0 + c) * b.lead_v + d + xkv_cu_lane() / 4 + e / 2 * 8;
                    if (store) {
                        *x = acc[g][e];
                    } else {
                        acc[g][e] = *x;
                    }
                }
            }
        }
    }
};

// grid: split, tile of queries, stream
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_lead(const __grid_constant__ xkv_cu_attn a, const __grid_constant__ xkv_cu_decode b, int n_most, int n_chunk) {
    XKV_DYNAMIC_SHARED(shared);
    const int j0    = blockIdx.y * n_most;
    const int split = blockIdx.x;

    xkv_cu_arena            arena = { (char *) shared };
    const xkv_cu_lead_block c(a, b, blockIdx.z, j0, min(n_most, b.n_query - j0), n_chunk, arena);

    const bool whole            = a.plain || c.one_slice(a); // the lead is one slice
    const bool stay             = !a.plain && a.lead[XKV_CU_V] <= 16 * xkv_cu_n_warp();
    float      acc[XKV_CU_G][4] = {};
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        c.max[i] = -INFINITY;
        c.sum[i] = 0.0f;
    }
    for (int i = threadIdx.x; i < c.n * b.lead_v && !stay; i += blockDim.x) {
        b.sums[b.part(c.s, split, j0) * b.lead_v + i] = 0.0f;
    }
    for (int ic0 = split; ic0 < a.n_frame; ic0 += n_chunk * b.n_split) {
        __syncthreads();
        const bool any = c.load_fill(ic0);
        if (any) {
            c.turn(ic0);
        }
        __syncthreads();
        if (any && c.one_slice(a)) {
            c.project(0, a.lead[XKV_CU_K]);
            __syncthreads();
        }
        for (int k = 0; k < n_chunk && ic0 + k * b.n_split < a.n_frame; ++k) {
            const int ic = ic0 + k * b.n_split;
            for (int d = 0; any && d < a.lead[XKV_CU_K];) {
                const int end = whole ? a.lead[XKV_CU_K] : c.slice_end(d, a.lead[XKV_CU_K]);
                if (!whole) {
                    c.project(d, end);
                    __syncthreads();
                }
                c.add_scores(ic, k, d, end, d == 0);
                __syncthreads();
                d = end;
            }
            for (int i = xkv_cu_warp(); i < c.n; i += xkv_cu_n_warp()) {
                c.weigh(ic, k, i);
            }
            __syncthreads();
            if (any) {
                c.add_values(ic, k, split, stay, acc);
            }
        }
    }
    if (stay && xkv_cu_warp() * 16 < a.lead[XKV_CU_V]) {
        c.move_sums(split, xkv_cu_warp() * 16, 0, c.n, acc, true);
    }
    for (int i = threadIdx.x; i < c.n; i += blockDim.x) {
        b.state[b.part(c.s, split, j0 + i)]    = make_float2(c.max[i], c.sum[i]);
        b.sums_max[b.part(c.s, split, j0 + i)] = c.max[i];
    }
}
