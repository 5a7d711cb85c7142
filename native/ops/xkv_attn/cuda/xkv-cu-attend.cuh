// Many queries on CUDA: how they meet a batch of tokens.

#pragma once

#include "xkv-cu-prefill.cuh"

struct xkv_cu_attend_shared {
    xkv_cu_panels panels;
    float *       score;  // [rows][XKV_CU_SPAN], then weights
    float *       factor; // of the sums so far
    int *         held;   // whether there are some
    int *         out;    // see xkv_cu_query
    size_t *      row;    // bytes to the query's numbers

    __host__ __device__ explicit xkv_cu_attend_shared(xkv_cu_arena & at) : panels(at) {
        score  = at.take<float>(XKV_CU_ROWS * XKV_CU_SPAN);
        factor = at.take<float>(XKV_CU_ROWS);
        held   = at.take<int>(XKV_CU_ROWS);
        out    = at.take<int>(XKV_CU_ROWS);
        row    = at.take<size_t>(XKV_CU_ROWS);
    }
};

struct xkv_cu_attend_block {
    const xkv_cu_attn &          a;
    const xkv_cu_prefill &       b;
    const xkv_cu_attend_shared & c;

    int  s, head, j0, n; // queries of the KV head
    int  first, n_token; // of the batch
    bool stored;

    __device__ int query(int i) const { return head * a.n_tps * a.n_gqa + j0 + i; }

    __device__ float * out(int i) const { return a.dst + ((size_t) s * a.n_head * a.n_tps + c.out[i]) * a.dim[XKV_CU_V]; }

    __device__ void find_queries() const {
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            c.out[i] = xkv_cu_find_query(a, query(i)).out;
            c.row[i] = (const char *) xkv_cu_query_row(a, c.out[i], s) - a.q;
        }
    }

    // what is added to the scores of tokens [t0, t0 + XKV_CU_SPAN) of the batch; false if no query sees any
    __device__ bool see(int t0) const {
        bool any = false;
        for (int e = threadIdx.x; e < XKV_CU_ROWS * XKV_CU_SPAN; e += blockDim.x) {
            const int i    = e / XKV_CU_SPAN;
            const int k    = t0 + e % XKV_CU_SPAN;
            const int t    = (j0 + i) / a.n_gqa;
            float     bias = -INFINITY;
            if (i < n && k < n_token) {
                if (stored) {
                    const int at = first + k;
                    bias         = at % a.n_chunk < xkv_cu_n_fill(a, at / a.n_chunk, t, s) ? 0.0f : -INFINITY;
                } else {
                    bias = xkv_cu_mask_at(a, first + k, t, s);
                }
            }
            c.score[e] = bias;
            any        = any || bias > -INFINITY;
        }
        return __syncthreads_or(any);
    }

    // adds queries times K; K that has not been made is of tokens that nobody sees
    __device__ void add_scores(int t0) const {
        const int dk = a.dim[XKV_CU_K];
        for (int k0 = 0; k0 < XKV_CU_SPAN && t0 + k0 < n_token; k0 += XKV_CU_COLS) {
            float acc[XKV_CU_OWN][XKV_CU_OWN] = {};
            for (int d = 0; d < dk; d += XKV_CU_DEPTH) {
                for (int e = threadIdx.x; e < XKV_CU_ROWS * XKV_CU_DEPTH; e += blockDim.x) {
                    const int i = e / XKV_CU_DEPTH;
                    const int r = e % XKV_CU_DEPTH;

                    c.panels.a[r * c.panels.lda + i] = i < n ? ((const float *) (a.q + c.row[i]))[d + r] * a.scale : 0.0f;
                }
                for (int e = threadIdx.x; e < XKV_CU_COLS * XKV_CU_DEPTH; e += blockDim.x) {
                    const int t = t0 + k0 + e / XKV_CU_DEPTH;
                    const int r = e % XKV_CU_DEPTH;

                    c.panels.b[r * c.panels.ldb + e / XKV_CU_DEPTH] =
                        t < n_token ? b.k[((size_t) head * XKV_CU_BATCH + t) * dk + d + r] : 0.0f;
                }
                __syncthreads();
                c.panels.multiply(acc);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < XKV_CU_OWN; ++i) {
#pragma unroll
                for (int k = 0; k < XKV_CU_OWN; ++k) {
                    float * x = c.score + (xkv_cu_warp() * XKV_CU_OWN + i) * XKV_CU_SPAN + k0 + xkv_cu_lane() + XKV_CU_WARP * k;
                    if (*x > -INFINITY) {
                        *x += acc[i][k];
                    }
                }
            }
        }
    }

    // a warp weighs the rows whose scores it has added up
    __device__ void weigh() const {
        for (int i = xkv_cu_warp() * XKV_CU_OWN; i < (xkv_cu_warp() + 1) * XKV_CU_OWN; ++i) {
            float * x = c.score + i * XKV_CU_SPAN;
            if (i >= n) {
                continue;
            }
            const float2 state = b.state[query(i)];
            float        max   = state.x;
            for (int t = xkv_cu_lane(); t < XKV_CU_SPAN; t += XKV_CU_WARP) {
                max = fmaxf(max, x[t]);
            }
            max       = xkv_cu_max(max);
            float sum = 0.0f;
            for (int t = xkv_cu_lane(); t < XKV_CU_SPAN; t += XKV_CU_WARP) {
                x[t] = x[t] > -INFINITY ? expf(x[t] - max) : 0.0f;
                sum += x[t];
            }
            sum = xkv_cu_sum(sum);
            if (xkv_cu_lane() == 0) {
                c.held[i]         = state.x > -INFINITY;
                c.factor[i]       = xkv_cu_rescale(state.x, max);
                b.state[query(i)] = make_float2(max, state.y * c.factor[i] + sum);
            }
        }
    }

    // adds weights times V to the output
    __device__ void add_values(int t0) const {
        const int dv  = a.dim[XKV_CU_V];
        const int end = min(XKV_CU_SPAN, n_token - t0);
        for (int d0 = 0; d0 < dv; d0 += XKV_CU_COLS) {
            float acc[XKV_CU_OWN][XKV_CU_OWN] = {};
            for (int t = 0; t < end; t += XKV_CU_DEPTH) {
                for (int e = threadIdx.x; e < XKV_CU_ROWS * XKV_CU_DEPTH; e += blockDim.x) {
                    const int i = e / XKV_CU_DEPTH;
                    const int r = e % XKV_CU_DEPTH;

                    c.panels.a[r * c.panels.lda + i] = i < n ? c.score[i * XKV_CU_SPAN + t + r] : 0.0f;
                }
                for (int e = threadIdx.x; e < XKV_CU_COLS * XKV_CU_DEPTH; e += blockDim.x) {
                    const int d = d0 + e % XKV_CU_COLS;
                    const int r = e / XKV_CU_COLS;

                    c.panels.b[r * c.panels.ldb + e % XKV_CU_COLS] =
                        d < dv && t0 + t + r < n_token ? b.v[((size_t) head * XKV_CU_BATCH + t0 + t + r) * dv + d] : 0.0f;
                }
                __syncthreads();
                c.panels.multiply(acc);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < XKV_CU_OWN; ++i) {
                const int row = xkv_cu_warp() * XKV_CU_OWN + i;
                if (row >= n) {
                    break;
                }
                float * o = out(row);
#pragma unroll
                for (int k = 0; k < XKV_CU_OWN; ++k) {
                    const int d = d0 + xkv_cu_lane() + XKV_CU_WARP * k;
                    if (d < dv) {
                        o[d] = c.held[row] ? o[d] * c.factor[row] + acc[i][k] : acc[i][k];
                    }
                }
            }
        }
    }
};

// grid: queries of a KV head, KV head
static __global__ void __launch_bounds__(XKV_CU_THREADS, 2)
    xkv_cu_attend(const __grid_constant__ xkv_cu_attn a, const xkv_cu_prefill b, int s, int first, int n_token, bool stored) {
    XKV_DYNAMIC_SHARED(shared);
    xkv_cu_arena               arena = { (char *) shared };
    const xkv_cu_attend_shared c(arena);
    const int                  j0 = blockIdx.x * XKV_CU_ROWS;
    const int                  n  = min(XKV_CU_ROWS, a.n_tps * a.n_gqa - j0);
    const xkv_cu_attend_block  block{ a, b, c, s, (int) blockIdx.y, j0, n, first, n_token, stored };

    block.find_queries();
    for (int t0 = 0; t0 < n_token; t0 += XKV_CU_SPAN) {
        if (!block.see(t0)) {
            continue;
        }
        block.add_scores(t0);
        block.weigh();
        __syncthreads();
        block.add_values(t0);
    }
}
