// Decoding on CUDA: what the pass by the lead and the refinement share. A block of threads has some queries and every n_split-th
// chunk; queries are ordered by KV head, then token, then head of the group.

#pragma once

#include "xkv-cu-tiles.cuh"

#define XKV_CU_THREADS 256
#define XKV_CU_TILE    32  // most queries of a block
#define XKV_CU_SLICE   128 // directions that queries are projected to at a time
#define XKV_CU_FINE    16  // tokens that are refined together

struct xkv_cu_query {
    int head; // KV head
    int token;
    int out; // head by head of each token, as q and dst are
};

static __device__ __forceinline__ xkv_cu_query xkv_cu_find_query(const xkv_cu_attn & a, int j) {
    const int m    = a.n_tps * a.n_gqa;
    const int head = j / m;
    const int t    = j % m / a.n_gqa;
    return { head, t, t * a.n_head + head * a.n_gqa + j % a.n_gqa };
}

static __device__ __forceinline__ const float * xkv_cu_query_row(const xkv_cu_attn & a, int out, int s) {
    return (const float *) (a.q + out % a.n_head * a.nb_q[0] + out / a.n_head * a.nb_q[1] + s * a.nb_q[2]);
}

static __device__ __forceinline__ int xkv_cu_n_fill(const xkv_cu_attn & a, int ic, int t, int s) {
    return *(const int *) (a.fill + ic * a.nb_fill[0] + t * a.nb_fill[1] + s * a.nb_fill[2]);
}

// device memory of a decoding run; j is a query
struct xkv_cu_decode {
    int n_query, n_split, n_span; // n_span: of exact tokens

    float *  sums;  // [stream][split][query][rank] of V, weighted by exp(score - max)
    float4 * state; // [stream][split][query] max, sum of weights, 1 if the sums hold more than the lead
    float *  exact; // [stream][span][query][d_v]
    float2 * exact_state;
    float *  share; // [stream][query][block of tokens] log of its sum of weights by the lead; -inf once refined
    float2 * least; // [stream][query] log of the sum of weights beyond which a block is refined: the least so far, this round's

    __host__ __device__ size_t part(int s, int split, int j) const { return ((size_t) s * n_split + split) * n_query + j; }
    __host__ __device__ size_t span(int s, int span, int j) const { return ((size_t) s * n_span + span) * n_query + j; }
};

// up to XKV_CU_VECS queries of a block that a warp takes together
struct xkv_cu_unit {
    int      head; // KV head, if they are of one
    int      first;
    uint32_t mask;
};

struct xkv_cu_chunk {
    const xkv_cu_attn &   a;
    const xkv_cu_decode & b;

    int s, j0, n;

    // shared by the block
    float *    q;     // [n][d_k] in the chunk's frame, times the scale
    float *    y;     // [n][XKV_CU_SLICE] through the basis of K
    float *    score; // [n][n_chunk], then weights
    float *    rough; // [n][n_chunk] of the refinement: by the lead
    float *    max;   // of each query, as are the rest
    float *    sum;
    float *    factor; // of the sums so far
    int *      have;   // what the sums hold: 0 nothing, 1 the lead, 2 all
    int *      held;   // and held before this chunk
    int *      fill;
    uint32_t * fine; // blocks of the chunk that count

    __host__ __device__ static size_t query_bytes(const xkv_cu_attn & a, bool refine) {
        return (a.dim[XKV_CU_K] + XKV_CU_SLICE + (refine ? 2 : 1) * a.n_chunk + 7) * sizeof(float);
    }

    __host__ __device__ xkv_cu_chunk(const xkv_cu_attn & a, const xkv_cu_decode & b, int s, int j0, int n, bool refine, xkv_cu_arena & at) :
        a(a), b(b), s(s), j0(j0), n(n) {
        q      = at.take<float>(n * a.dim[XKV_CU_K]);
        y      = at.take<float>(n * XKV_CU_SLICE);
        score  = at.take<float>(n * a.n_chunk);
        rough  = refine ? at.take<float>(n * a.n_chunk) : nullptr;
        max    = at.take<float>(n);
        sum    = at.take<float>(n);
        factor = at.take<float>(n);
        have   = at.take<int>(n);
        held   = at.take<int>(n);
        fill   = at.take<int>(n);
        fine   = at.take<uint32_t>(n);
    }

    __device__ int n_fine() const { return a.n_chunk / XKV_CU_FINE; }

    __device__ float * share(int i) const { return b.share + ((size_t) s * b.n_query + j0 + i) * a.n_frame * n_fine(); }

    __device__ const uint8_t * coef(int ic, int kd, const xkv_cu_segment & seg, int head) const {
        return a.coef + ic * a.nb_coef[0] + s * a.nb_coef[1] + seg.coef + (a.plain ? head * a.head_coef[kd] : 0);
    }

    // units of queries of one KV head, or of any
    __device__ int heads_from() const { return j0 / (a.n_tps * a.n_gqa); }
    __device__ int units_of_head() const { return (a.n_tps * a.n_gqa + XKV_CU_VECS - 1) / XKV_CU_VECS; }
    __device__ int n_unit(bool by_head) const {
        if (!by_head) {
            return (n + XKV_CU_VECS - 1) / XKV_CU_VECS;
        }
        return ((j0 + n - 1) / (a.n_tps * a.n_gqa) - heads_from() + 1) * units_of_head();
    }

    __device__ xkv_cu_unit unit(int u, bool by_head) const {
        xkv_cu_unit res = { 0, u * XKV_CU_VECS, 0 };
        int         end = n;
        if (by_head) {
            const int m = a.n_tps * a.n_gqa;
            res.head    = heads_from() + u / units_of_head();
            res.first   = ::max(j0, res.head * m) - j0 + u % units_of_head() * XKV_CU_VECS;
            end         = ::min(j0 + n, (res.head + 1) * m) - j0;
        }
        for (int i = 0; i < XKV_CU_VECS; ++i) {
            if (res.first + i < end && fine[res.first + i]) {
                res.mask |= 1u << i;
            }
        }
        return res;
    }

    // queries of a unit that have a block in tokens [t0, t1)
    __device__ uint32_t some(const xkv_cu_unit & u, int t0, int t1) const {
        const uint32_t blocks = (0xffffu >> (16 - (t1 - t0) / XKV_CU_FINE)) << t0 / XKV_CU_FINE;
        uint32_t       res    = 0;
        for (int i = 0; i < XKV_CU_VECS; ++i) {
            if ((u.mask >> i & 1) && (fine[u.first + i] & blocks)) {
                res |= 1u << i;
            }
        }
        return res;
    }

    // queries in the chunk's frame; their scores begin with the mean of K
    __device__ void turn(int ic) const {
        const int     dk    = a.dim[XKV_CU_K];
        const int     pairs = a.n_rot / 2;
        const float * c     = (const float *) (a.turn + ((size_t) s * a.n_frame + ic) * a.nb_turn);
        for (int i = xkv_cu_warp(); i < n; i += xkv_cu_n_warp()) {
            if (!fine[i]) {
                continue;
            }
            const xkv_cu_query at    = xkv_cu_find_query(a, j0 + i);
            const float *      x     = xkv_cu_query_row(a, at.out, s);
            const float *      mean  = a.mean + at.head * dk;
            float              first = 0.0f;
            for (int d = xkv_cu_lane(); d < dk; d += XKV_CU_WARP) {
                const int r = d - a.rot_first;
                float     z = x[d];
                if (r >= 0 && r < a.n_rot) {
                    const bool one  = a.neox ? r < pairs : r % 2 == 0;
                    const int  step = a.neox ? pairs : 1;
                    z               = one ? z * c[r] - x[d + step] * c[r + step] : x[d - step] * c[r] + z * c[r - step];
                }
                z *= a.scale;
                q[i * dk + d] = z;
                first += z * mean[d];
            }
            first = xkv_cu_sum(first);
            for (int t = xkv_cu_lane(); t < a.n_chunk; t += XKV_CU_WARP) {
                score[i * a.n_chunk + t] = first;
            }
        }
    }

    // scores by the lead; each thread keeps those that it weighs
    __device__ void keep_rough() const {
        for (int i = xkv_cu_warp(); i < n; i += xkv_cu_n_warp()) {
            for (int t = xkv_cu_lane(); t < a.n_chunk; t += XKV_CU_WARP) {
                rough[i * a.n_chunk + t] = score[i * a.n_chunk + t];
            }
        }
    }

    // end of a slice that begins at direction d0: whole tiles of each segment's coefficients
    __device__ int slice_end(int d0, int limit) const {
        int end = d0;
        for (int is = 0; is < a.n_segment[XKV_CU_K]; ++is) {
            const xkv_cu_segment & seg  = a.segments[XKV_CU_K][is];
            const int              n    = ::min(seg.first + seg.rank, limit) - end;
            const int              room = d0 + XKV_CU_SLICE - end;
            if (n > room) {
                return end + room / xkv_cu_cols(seg.type) * xkv_cu_cols(seg.type);
            }
            end += ::max(n, 0);
        }
        return end;
    }

    // queries through directions [d0, d1) of the basis of K
    __device__ void project(int d0, int d1) const {
        const int dk     = a.dim[XKV_CU_K];
        const int n_tile = (d1 - d0) / 16;
        for (int item = xkv_cu_warp(); item < n_unit(true) * n_tile; item += xkv_cu_n_warp()) {
            const xkv_cu_unit u = unit(item / n_tile, true);
            if (!u.mask) {
                continue;
            }
            const int d  = d0 + item % n_tile * 16;
            int       is = 0;
            while (d >= a.segments[XKV_CU_K][is].first + a.segments[XKV_CU_K][is].rank) {
                ++is;
            }
            const xkv_cu_segment & seg              = a.segments[XKV_CU_K][is];
            const uint8_t *        base             = a.basis + a.kind_basis[XKV_CU_K] + u.head * a.head_basis[XKV_CU_K] + seg.basis;
            float                  acc[XKV_CU_VECS] = {};
            xkv_cu_dot(seg.type_basis, base + (d - seg.first) / 16 * xkv_cu_rows_bytes(seg.type_basis, dk), dk, q + u.first * dk, dk,
                       u.mask, acc);
            xkv_cu_both(u.mask, acc);
#pragma unroll
            for (int i = 0; i < XKV_CU_VECS; ++i) {
                if ((u.mask >> i & 1) && xkv_cu_lane() < 16) {
                    y[(u.first + i) * XKV_CU_SLICE + d - d0 + xkv_cu_lane()] = acc[i];
                }
            }
        }
    }

    // adds directions [d0, d1) to the scores of the blocks that count; x has the queries' numbers of these directions
    __device__ void add_scores(int ic, const float * x, int ldx, int d0, int d1) const {
        for (int item = xkv_cu_warp(); item < n_unit(a.plain) * n_fine(); item += xkv_cu_n_warp()) {
            const int         t = item % n_fine() * 16;
            const xkv_cu_unit u = unit(item / n_fine(), a.plain);
            const uint32_t    m = some(u, t, t + 16);
            if (!m) {
                continue;
            }
            float acc[XKV_CU_VECS] = {};
            for (int is = 0; is < a.n_segment[XKV_CU_K]; ++is) {
                const xkv_cu_segment & seg = a.segments[XKV_CU_K][is];
                const int              r0  = ::max(d0 - seg.first, 0);
                const int              r1  = ::min(d1 - seg.first, seg.rank);
                if (r0 < r1) {
                    const uint8_t * tiles =
                        coef(ic, XKV_CU_K, seg, u.head) + t / 16 * xkv_cu_rows_bytes(seg.type, seg.rank) + xkv_cu_rows_bytes(seg.type, r0);
                    xkv_cu_dot(seg.type, tiles, r1 - r0, x + u.first * ldx + seg.first + r0 - d0, ldx, m, acc);
                }
            }
            xkv_cu_both(m, acc);
#pragma unroll
            for (int i = 0; i < XKV_CU_VECS; ++i) {
                if ((m >> i & 1) && xkv_cu_lane() < 16) {
                    score[(u.first + i) * a.n_chunk + t + xkv_cu_lane()] += acc[i];
                }
            }
        }
    }

    // adds directions [d0, d1) to the scores, a slice at a time
    __device__ void add_directions(int ic, int d0, int d1) const {
        if (a.plain) {
            add_scores(ic, q + d0, a.dim[XKV_CU_K], d0, d1);
            __syncthreads();
            return;
        }
        for (int d = d0; d < d1;) {
            const int end = slice_end(d, d1);
            project(d, end);
            __syncthreads();
            add_scores(ic, y, XKV_CU_SLICE, d, end);
            __syncthreads();
            d = end;
        }
    }

    // adds V of the blocks that count to the sums of the split: directions below the lead by weights w, others by v, up to limit
    __device__ void add_values(int ic, int split, const float * w, const float * v, int limit) const {
        const int n_tile = (limit + 15) / 16;
        for (int item = xkv_cu_warp(); item < n_unit(a.plain) * n_tile; item += xkv_cu_n_warp()) {
            const xkv_cu_unit u = unit(item / n_tile, a.plain);
            if (!u.mask) {
                continue;
            }
            const int d  = item % n_tile * 16;
            int       is = 0;
            while (d >= a.segments[XKV_CU_V][is].first + a.segments[XKV_CU_V][is].rank) {
                ++is;
            }
            const xkv_cu_segment & seg   = a.segments[XKV_CU_V][is];
            const int              cols  = xkv_cu_cols(seg.type);
            const bool             lead  = d < a.lead[XKV_CU_V];
            const float *          x     = (lead ? w : v) + u.first * a.n_chunk;
            const uint8_t *        tiles = coef(ic, XKV_CU_V, seg, u.head) + (d - seg.first) / 16 * xkv_cu_rows_bytes(seg.type, a.n_chunk);
            float                  acc[XKV_CU_VECS] = {};
            for (int t = 0; t < a.n_chunk; t += cols) {
                const uint32_t m = some(u, t, t + cols);
                if (m) {
                    xkv_cu_dot(seg.type, tiles + xkv_cu_rows_bytes(seg.type, t), cols, x + t, a.n_chunk, m, acc);
                }
            }
            xkv_cu_both(u.mask, acc);
#pragma unroll
            for (int i = 0; i < XKV_CU_VECS; ++i) {
                if ((u.mask >> i & 1) && xkv_cu_lane() < 16) {
                    const int j   = u.first + i;
                    float *   res = b.sums + b.part(s, split, j0 + j) * a.rank[XKV_CU_V] + d + xkv_cu_lane();
                    *res          = held[j] >= (lead ? 1 : 2) ? *res * factor[j] + acc[i] : acc[i];
                }
            }
        }
    }
};
