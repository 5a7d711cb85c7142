// Queries on CUDA, ordered by KV head, then token, then head of the group: where they are, what they see, and how they get to a
// chunk's frame.

#pragma once

#include "xkv-cu-rows.cuh"

#define XKV_CU_THREADS 256
#define XKV_CU_FINE    16 // tokens that are refined together

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

// 1 - 2 / (e^2x + 1), since tanh itself is rough where math is fast
static __device__ __forceinline__ float xkv_cu_cap(const xkv_cu_attn & a, float x) {
    return a.softcap > 0.0f ? a.softcap * (1.0f - 2.0f / (expf(2.0f * x / a.softcap) + 1.0f)) : x;
}

// a logit that has a part of the softmax and no value
static __device__ __forceinline__ float xkv_cu_sink(const xkv_cu_attn & a, int out) {
    return a.sinks ? a.sinks[out % a.n_head] : -INFINITY;
}

static __device__ __forceinline__ int xkv_cu_n_fine(const xkv_cu_attn & a) {
    return a.n_chunk / XKV_CU_FINE;
}

static __device__ __forceinline__ const uint8_t * xkv_cu_coef(const xkv_cu_attn & a, int ic, int s, int kd, const xkv_cu_segment & seg,
                                                              int head) {
    return a.coef + ic * a.nb_coef[0] + s * a.nb_coef[1] + seg.coef + (a.plain ? head * a.head_coef[kd] : 0);
}

static __device__ __forceinline__ const uint8_t * xkv_cu_basis(const xkv_cu_attn & a, int kd, const xkv_cu_segment & seg, int head) {
    return a.basis + a.kind_basis[kd] + head * a.head_basis[kd] + seg.basis;
}

// which segment a direction is in
static __device__ __forceinline__ int xkv_cu_find_segment(const xkv_cu_attn & a, int kd, int d) {
    int is = 0;
    while (d >= a.segments[kd][is].first + a.segments[kd][is].rank) {
        ++is;
    }
    return is;
}

// By a warp: query j in the chunk's frame, times the scale, to a row. Its product with the mean of K, which all scores have.
static __device__ float xkv_cu_turn(const xkv_cu_attn & a, int ic, int s, int j, const xkv_cu_rows & rows, size_t row) {
    const int          dk    = a.dim[XKV_CU_K];
    const int          pairs = a.n_rot / 2;
    const int          step  = a.neox ? pairs : 1;
    const xkv_cu_query at    = xkv_cu_find_query(a, j);
    const float *      x     = xkv_cu_query_row(a, at.out, s);
    const float *      mean  = a.mean + at.head * dk;
    const float *      c     = (const float *) (a.turn + ((size_t) s * a.n_frame + ic) * a.nb_turn);
    float              first = 0.0f;
    for (int d0 = 0; d0 < rows.n; d0 += 4 * XKV_CU_WARP) {
        const int d    = d0 + 4 * xkv_cu_lane();
        float     v[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = d + i - a.rot_first;
            if (d + i >= dk) {
                continue;
            }
            float z = x[d + i];
            if (r >= 0 && r < a.n_rot) {
                const bool one = a.neox ? r < pairs : r % 2 == 0;
                z              = one ? z * c[r] - x[d + i + step] * c[r + step] : x[d + i - step] * c[r] + z * c[r - step];
            }
            v[i] = z * a.scale;
            first += v[i] * mean[d + i];
        }
        xkv_cu_round(rows, row, d, make_float4(v[0], v[1], v[2], v[3]), d < rows.n);
    }
    return xkv_cu_sum(first);
}

// directions [d0, d1) of a kind in strips of a size that do not leave their segment
struct xkv_cu_strip {
    int segment;
    int first; // of the segment's directions
    int n;     // 0: there is none
};

static __device__ __forceinline__ int xkv_cu_n_strip(const xkv_cu_attn & a, int kd, int d0, int d1, int size) {
    int n = 0;
    for (int is = 0; is < a.n_segment[kd]; ++is) {
        const xkv_cu_segment & seg = a.segments[kd][is];
        n += (max(min(d1, seg.first + seg.rank) - max(d0, seg.first), 0) + size - 1) / size;
    }
    return n;
}

static __device__ __forceinline__ xkv_cu_strip xkv_cu_find_strip(const xkv_cu_attn & a, int kd, int d0, int d1, int size, int k) {
    for (int is = 0; is < a.n_segment[kd]; ++is) {
        const xkv_cu_segment & seg = a.segments[kd][is];
        const int              r0  = max(d0 - seg.first, 0);
        const int              r1  = min(d1 - seg.first, seg.rank);
        const int              n   = (max(r1 - r0, 0) + size - 1) / size;
        if (k < n) {
            return { is, r0 + k * size, min(size, r1 - r0 - k * size) };
        }
        k -= n;
    }
    return { 0, 0, 0 };
}

// By a warp: a strip of the n_col rows of q in the group through the basis of K, to rows row_of(i) of y, where it begins at column
// col.
template <int G, typename E, typename F>
static __device__ void xkv_cu_project(const xkv_cu_attn & a, int head, const xkv_cu_strip & strip, const xkv_cu_rows & q,
                                      const xkv_cu_group<G, E> & from, const xkv_cu_rows & y, int n_col, F && row_of, int col) {
    const xkv_cu_segment & seg   = a.segments[XKV_CU_K][strip.segment];
    const int              dk    = a.dim[XKV_CU_K];
    const size_t           bytes = xkv_cu_rows_bytes(seg.type_basis, dk);
    const uint8_t *        tiles = xkv_cu_basis(a, XKV_CU_K, seg, head) + strip.first / 16 * bytes;

    float acc[2][G][4] = {};
    xkv_cu_mul(seg.type_basis, tiles, dk, q, 0, from, acc[0]);
    if (strip.n > 16) {
        xkv_cu_mul(seg.type_basis, tiles + bytes, dk, q, 0, from, acc[1]);
    }
    const bool ints = seg.type > XKV_CU_F16;
    const int  r    = xkv_cu_lane() / 4;
    const int  j    = xkv_cu_lane() % 4;
#pragma unroll
    for (int g = 0; g < G; ++g) {
        if (!(from.on >> g & 1)) {
            continue;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const bool  on   = 8 * g + 2 * j + c < n_col;
            const int   row  = row_of(min(8 * g + 2 * j + c, n_col - 1));
            const float v[4] = { acc[0][g][c], acc[0][g][c + 2], acc[1][g][c], acc[1][g][c + 2] };
            if (!ints && on) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (8 * i < strip.n) {
                        y.floats(row)[col + 8 * i + r] = v[i];
                    }
                }
            }
            if (!ints) {
                continue;
            }
            uint32_t most = 0;
            int      sum  = 0;
            uint32_t w    = 0; // codes of directions r, r + 8, r + 16 and r + 24
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                most = max(most, xkv_cu_size_bits(v[i]));
            }
#pragma unroll
            for (int i = 4; i < XKV_CU_WARP; i *= 2) {
                most = max(most, __shfl_xor_sync(XKV_CU_ALL, most, i));
            }
            const float f = xkv_cu_factor(most);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int code = __float2int_rn(v[i] * f);
                sum += code;
                w |= (uint32_t) (code & 255) << 8 * i;
            }
#pragma unroll
            for (int i = 4; i < XKV_CU_WARP; i *= 2) {
                sum += __shfl_xor_sync(XKV_CU_ALL, sum, i);
            }
            uint32_t word = 0; // codes of directions 4r to 4r + 3
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                word |= (__shfl_sync(XKV_CU_ALL, w, (4 * (r % 2) + i) * 4 + j) >> 8 * (r / 2) & 255) << 8 * i;
            }
            if (on) {
                *(uint32_t *) (y.codes(row) + col + 4 * r) = word;
                if (r == 0) {
                    y.scales(row)[col / XKV_CU_ROUND] = { __uint_as_float(most) / 127.0f, sum };
                }
            }
        }
    }
}

// adds directions [d0, d1) of 16 tokens from t on to the scores in acc; the rows of y begin with direction d0 - col
template <int G, typename F>
static __device__ __forceinline__ void xkv_cu_add_scores(const xkv_cu_attn & a, int ic, int s, int head, int t, int d0, int d1,
                                                         const xkv_cu_rows & y, int col, const xkv_cu_group<G, F> & at,
                                                         float (&acc)[G][4]) {
    for (int is = 0; is < a.n_segment[XKV_CU_K]; ++is) {
        const xkv_cu_segment & seg = a.segments[XKV_CU_K][is];
        const int              r0  = max(d0 - seg.first, 0);
        const int              r1  = min(d1 - seg.first, seg.rank);
        if (r0 < r1) {
            const uint8_t * tiles = xkv_cu_coef(a, ic, s, XKV_CU_K, seg, head) + t / 16 * xkv_cu_rows_bytes(seg.type, seg.rank) +
                                    xkv_cu_rows_bytes(seg.type, r0);
            xkv_cu_mul(seg.type, tiles, r1 - r0, y, seg.first + r0 - d0 + col, at, acc);
        }
    }
}
