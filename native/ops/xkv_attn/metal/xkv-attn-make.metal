// Many queries: K and V of a batch of tokens are made for all KV heads as f32, meet all queries and are forgotten.

#include "xkv-mtl-query.h"

#define XKV_MTL_MAKE_N_WARP (XKV_MTL_MAKE_THREADS / XKV_MTL_WARP)

// what is loaded to a panel: directions [r0, r0 + XKV_MTL_DEPTH) of entries [first, first + n)
struct xkv_mtl_panel {
    int  n_row, n_col; // of the matrix of tiles
    bool by_row;       // directions are its rows, else its columns
    int  r0, first, n;
    int  step_r, step_x; // in the panel
};

// 0 past the end of the matrix
template <int type>
static inline void xkv_mtl_load_panel_type(device const uchar * tiles, thread const xkv_mtl_panel & p, threadgroup float * panel,
                                           int thread_index) {
    for (int e = thread_index; e < p.n * XKV_MTL_DEPTH / 4; e += XKV_MTL_MAKE_THREADS) {
        const int r   = p.by_row ? e % XKV_MTL_DEPTH : e % (XKV_MTL_DEPTH / 4) * 4;
        const int x   = p.by_row ? e / XKV_MTL_DEPTH * 4 : e / (XKV_MTL_DEPTH / 4);
        const int row = p.by_row ? p.r0 + r : p.first + x;
        const int col = p.by_row ? p.first + x : p.r0 + r;
        float4    z   = float4(0.0f);
        if (row < p.n_row && col < p.n_col) {
            z = xkv_mtl_four_of<type>(tiles, p.n_col, row, col);
        }
        threadgroup float * to   = panel + r * p.step_r + x * p.step_x;
        const int           step = p.by_row ? p.step_x : p.step_r;
        to[0]                    = z[0];
        to[step]                 = z[1];
        to[2 * step]             = z[2];
        to[3 * step]             = z[3];
    }
}

static inline void xkv_mtl_load_panel(int type, device const uchar * tiles, thread const xkv_mtl_panel & p, threadgroup float * panel,
                                      int thread_index) {
    switch (type) {
    case XKV_MTL_F32:
        return xkv_mtl_load_panel_type<XKV_MTL_F32>(tiles, p, panel, thread_index);
    case XKV_MTL_F16:
        return xkv_mtl_load_panel_type<XKV_MTL_F16>(tiles, p, panel, thread_index);
    case XKV_MTL_Q8_0:
        return xkv_mtl_load_panel_type<XKV_MTL_Q8_0>(tiles, p, panel, thread_index);
    case XKV_MTL_Q5_0:
        return xkv_mtl_load_panel_type<XKV_MTL_Q5_0>(tiles, p, panel, thread_index);
    case XKV_MTL_Q4_0:
        return xkv_mtl_load_panel_type<XKV_MTL_Q4_0>(tiles, p, panel, thread_index);
    case XKV_MTL_Q2_0:
        return xkv_mtl_load_panel_type<XKV_MTL_Q2_0>(tiles, p, panel, thread_index);
    default:
        return xkv_mtl_load_panel_type<XKV_MTL_Q1_0>(tiles, p, panel, thread_index);
    }
}

static inline int xkv_mtl_dim(int kd) {
    return kd == XKV_MTL_K ? fc_dim_k : fc_dim_v;
}

// K or V of a KV head of the batch
static inline device float * xkv_mtl_made(thread const xkv_mtl_in & in, int kd, int head, int slot) {
    device float * res = xkv_mtl_scratch<float>(in, kd == XKV_MTL_K ? in.a->at_k : in.a->at_v);
    return res + ((uint64_t) head * XKV_MTL_BATCH + slot) * xkv_mtl_dim(kd);
}

// whether any query of the batch sees token t of a chunk or one after it
static inline bool xkv_mtl_any_sees(thread const xkv_mtl_in & in, threadgroup int * any, int ic, int t, int s) {
    bool some = false;
    for (int i = in.thread_index; i < in.a->n_tps; i += XKV_MTL_MAKE_THREADS) {
        some = some || xkv_mtl_n_fill(in, ic, i, s) > t;
    }
    return xkv_mtl_any(some, in, any, XKV_MTL_MAKE_N_WARP);
}

// plain: numbers as they are; else 0, since tokens that nobody sees have weights of 0, and V has to be a number
static inline void xkv_mtl_copy(thread const xkv_mtl_in & in, device const uchar * coef, device float * res, int kd, int t0, int d0,
                                bool zero) {
    constant xkv_mtl_args & a   = *in.a;
    const int               dim = xkv_mtl_dim(kd);
    for (int e = in.thread_index; e < XKV_MTL_ROWS * XKV_MTL_COLS; e += XKV_MTL_MAKE_THREADS) {
        const int t = e / XKV_MTL_COLS;
        const int d = d0 + e % XKV_MTL_COLS;
        if (d >= dim) {
            continue;
        }
        float x = 0.0f;
        if (!zero) {
            constant xkv_mtl_segment & seg = a.segments[kd][xkv_mtl_segment_of(a, kd, d)];
            const int                  row = kd == XKV_MTL_K ? t0 + t : d - seg.first;
            const int                  col = kd == XKV_MTL_K ? d - seg.first : t0 + t;
            const int                  n   = kd == XKV_MTL_K ? seg.rank : fc_n_chunk;
            x                              = xkv_mtl_four_at(seg.type, coef + seg.coef, n, row, col / 4 * 4)[col % 4];
        }
        res[t * dim + d] = x;
    }
}

// XKV_MTL_ROWS stored tokens; grid: tokens from first on, numbers of a head, 2 * KV head + kind
kernel void kernel_xkv_attn_make(XKV_MTL_PARAMS) {
    const xkv_mtl_in in   = XKV_MTL_IN;
    const int        kd   = in.block[2] % 2;
    const int        head = in.block[2] / 2;
    const int        s    = step.stream;
    const int        dim  = xkv_mtl_dim(kd);
    const int        d0   = in.block[1] * XKV_MTL_COLS;
    const int        slot = in.block[0] * XKV_MTL_ROWS; // in the batch
    const int        ic   = (step.first + slot) / fc_n_chunk;
    const int        t0   = (step.first + slot) % fc_n_chunk;
    if (d0 >= dim) {
        return;
    }
    const xkv_mtl_make_layout l   = xkv_mtl_lay_out_make();
    threadgroup float *       pa  = xkv_mtl_piece<float>(in, l.a, XKV_MTL_ROWS * XKV_MTL_LD_PANEL);
    threadgroup float *       pb  = xkv_mtl_piece<float>(in, l.b, XKV_MTL_DEPTH * XKV_MTL_LD_COLS);
    threadgroup int *         any = xkv_mtl_piece<int>(in, l.any, XKV_MTL_MAKE_N_WARP);

    device float *       res     = xkv_mtl_made(in, kd, head, slot);
    device const uchar * coef_of = xkv_mtl_coef_of(in, kd, ic, head, s);
    const bool           seen    = xkv_mtl_any_sees(in, any, ic, t0, s);
    if (!seen || fc_plain != 0) {
        xkv_mtl_copy(in, coef_of, res, kd, t0, d0, !seen);
        return;
    }
    // a SIMD group has 16 tokens by 32 numbers
    const int          row  = in.warp / 2 * 16;
    const int          col  = in.warp % 2 * 32;
    const bool         is_k = kd == XKV_MTL_K;
    simdgroup_float8x8 acc[2][4];
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
            acc[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }
    for (int is = 0; is < a.n_segment[kd]; ++is) {
        constant xkv_mtl_segment & seg  = a.segments[kd][is];
        device const uchar *       base = xkv_mtl_basis_of(in, kd, head) + seg.basis;
        for (int r = 0; r < seg.rank; r += XKV_MTL_DEPTH) {
            const xkv_mtl_panel from_coef = {
                is_k ? fc_n_chunk : seg.rank, is_k ? seg.rank : fc_n_chunk, !is_k, r, t0, XKV_MTL_ROWS, 1, XKV_MTL_LD_PANEL
            };
            const xkv_mtl_panel from_basis = {
                is_k ? seg.rank : dim, is_k ? dim : seg.rank, is_k, r, d0, XKV_MTL_COLS, XKV_MTL_LD_COLS, 1
            };
            xkv_mtl_load_panel(seg.type, coef_of + seg.coef, from_coef, pa, in.thread_index);
            xkv_mtl_load_panel(seg.type_basis, base, from_basis, pb, in.thread_index);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int e = 0; e < XKV_MTL_DEPTH; e += 8) {
                simdgroup_float8x8 x[2], y[4];
                XKV_MTL_UNROLL
                for (int i = 0; i < 2; ++i) {
                    simdgroup_load(x[i], pa + (row + 8 * i) * XKV_MTL_LD_PANEL + e, XKV_MTL_LD_PANEL);
                }
                XKV_MTL_UNROLL
                for (int j = 0; j < 4; ++j) {
                    simdgroup_load(y[j], pb + e * XKV_MTL_LD_COLS + col + 8 * j, XKV_MTL_LD_COLS);
                }
                XKV_MTL_UNROLL
                for (int i = 0; i < 2; ++i) {
                    XKV_MTL_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        simdgroup_multiply_accumulate(acc[i][j], x[i], y[j], acc[i][j]);
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
            const int d = d0 + col + 8 * j;
            if (d < dim) {
                simdgroup_store(acc[i][j], res + (row + 8 * i) * dim + d, dim);
            }
        }
    }
}

// stored K with its mean, turned back from its chunk's frame; grid: tokens from first on, KV head
kernel void kernel_xkv_attn_turn_back(XKV_MTL_PARAMS) {
    const xkv_mtl_in     in    = XKV_MTL_IN;
    const int            head  = in.block[1];
    const int            ic    = (step.first + in.block[0]) / fc_n_chunk;
    device float *       x     = xkv_mtl_made(in, XKV_MTL_K, head, in.block[0]);
    device const float * of_k  = in.mean + head * fc_dim_k;
    device const float * c     = xkv_mtl_turn_of(in, ic, step.stream);
    const int            pairs = a.n_rot / 2;
    for (int i = in.lane; i < fc_dim_k - pairs; i += XKV_MTL_WARP) {
        if (i < pairs) {
            const int   r0 = fc_neox != 0 ? i : 2 * i;
            const int   r1 = fc_neox != 0 ? i + pairs : 2 * i + 1;
            const int   d0 = a.rot_first + r0;
            const int   d1 = a.rot_first + r1;
            const float y0 = x[d0] + of_k[d0];
            const float y1 = x[d1] + of_k[d1];
            x[d0]          = y0 * c[r0] + y1 * c[r1];
            x[d1]          = y1 * c[r0] - y0 * c[r1];
        } else {
            const int j = i - pairs; // of the numbers that are not turned
            const int d = j < a.rot_first ? j : j + a.n_rot;
            x[d] += of_k[d];
        }
    }
}

// exact tokens as f32, zeros past the last one; grid: tokens from first on, KV head
kernel void kernel_xkv_attn_load_exact(XKV_MTL_PARAMS) {
    const xkv_mtl_in in   = XKV_MTL_IN;
    const int        head = in.block[1];
    for (int kd = 0; kd < 2; ++kd) {
        const int           type = kd == XKV_MTL_K ? fc_exact_k : fc_exact_v;
        device const char * row  = xkv_mtl_exact_row(in, kd, step.first + in.block[0], head, step.stream);
        device float *      res  = xkv_mtl_made(in, kd, head, in.block[0]);
        for (int d = in.lane; d < xkv_mtl_dim(kd); d += XKV_MTL_WARP) {
            res[d] = in.block[0] < step.n_token ? xkv_mtl_exact_at(type, row, d) : 0.0f;
        }
    }
}
