#include "xkv-mtl-plan.h"

#include <algorithm>
#include <utility>

// bytes of the sums of all splits, if it takes fewer splits to stay below
static const size_t XKV_MTL_SUMS = 32 << 20;

static const int XKV_MTL_N_ROUND = 3;
static const int XKV_MTL_N_SPAN  = 16;

static int xkv_mtl_parts(int n, int size) {
    return (n + size - 1) / size;
}

namespace {

struct planner {
    xkv_mtl_plan          plan;
    const xkv_mtl_shape & shape;
    int                   n_core;

    xkv_mtl_args & a = plan.args;

    int dim(int kd) const { return shape.fc[kd == XKV_MTL_K ? XKV_MTL_FC_DIM_K : XKV_MTL_FC_DIM_V]; }
    int n_chunk() const { return shape.fc[XKV_MTL_FC_N_CHUNK]; }
    int n_gqa() const { return shape.fc[XKV_MTL_FC_N_GQA]; }

    // a piece of scratch memory; on the CPU it ends in a guard zone
    uint64_t take(size_t n, size_t size) {
        const uint64_t at = plan.n_scratch;
        plan.n_scratch += (n * size + 15) / 16 * 16;
        plan.guards.push_back(plan.n_scratch);
        plan.n_scratch += XKV_GUARD_BYTES;
        return at;
    }

    xkv_mtl_launch & launch(const char * kernel, int x, int y, int z, int n_thread, int n_shared, bool waits = true) {
        plan.launches.push_back({ kernel, { x, y, z }, n_thread, n_shared, {}, waits });
        return plan.launches.back();
    }

    // queries of a threadgroup: whole units of a SIMD group where there is room, few where that makes more work for a GPU that has
    // nothing else to do
    int tile(bool refine) const {
        int n = 1;
        while (n < XKV_MTL_TILE && n < a.n_query && fits(n + 1, refine)) {
            ++n;
        }
        n = n > XKV_MTL_VECS ? n / XKV_MTL_VECS * XKV_MTL_VECS : n;
        while (n > XKV_MTL_VECS && a.n_frame * a.n_stream * xkv_mtl_parts(a.n_query, n) < 2 * n_core) {
            n = xkv_mtl_parts(n / 2, XKV_MTL_VECS) * XKV_MTL_VECS;
        }
        return n;
    }

    bool fits(int n, bool refine) const {
        const int n_guard = 12; // pieces
        return xkv_mtl_lay_out_chunk(n, dim(XKV_MTL_K), n_chunk(), refine).size - n_guard * XKV_GUARD_BYTES <= XKV_MTL_SHARED;
    }

    int tokens_of_span() const {
        return xkv_mtl_parts(xkv_mtl_parts(a.n_exact, XKV_MTL_N_SPAN), XKV_MTL_EXACT_BLOCK) * XKV_MTL_EXACT_BLOCK;
    }

    void decode() {
        a.n_span  = a.n_exact > 0 ? xkv_mtl_parts(a.n_exact, tokens_of_span()) : 0;
        a.n_split = 0;
        if (a.n_frame > 0) {
            const int    n_group = xkv_mtl_parts(a.n_query, tile(false)) * a.n_stream;
            const size_t bytes   = (size_t) a.n_query * a.n_stream * a.rank[XKV_MTL_V] * sizeof(float);
            const int    most    = (int) std::min<size_t>(a.n_frame, std::max<size_t>(1, XKV_MTL_SUMS / std::max<size_t>(bytes, 1)));
            const int    n       = std::min(most, xkv_mtl_parts(4 * n_core, n_group));
            a.n_split            = xkv_mtl_parts(a.n_frame, xkv_mtl_parts(a.n_frame, n));
        }
        const size_t n_query = (size_t) a.n_query * a.n_stream;

        a.at_sums        = take(a.n_split * n_query * a.rank[XKV_MTL_V], 4);
        a.at_state       = take(a.n_split * n_query, 16);
        a.at_exact       = take(a.n_span * n_query * dim(XKV_MTL_V), 4);
        a.at_exact_state = take(a.n_span * n_query, 8);
        a.at_share       = take(n_query * a.n_frame * (n_chunk() / XKV_MTL_FINE), 4);
        a.at_least       = take(n_query, 8);

        if (a.n_split > 0) {
            const int n    = tile(false);
            const int size = xkv_mtl_lay_out_chunk(n, dim(XKV_MTL_K), n_chunk(), false).size;
            launch("lead", a.n_split, xkv_mtl_parts(a.n_query, n), a.n_stream, XKV_MTL_THREADS, size, false).step.n = n;
        }
        if (a.n_span > 0) {
            const int n_unit = xkv_mtl_parts(a.n_tps * n_gqa(), XKV_MTL_VECS);
            const int size   = xkv_mtl_lay_out_exact(dim(XKV_MTL_K)).size;
            launch("exact", a.n_span, a.n_head_kv * n_unit, a.n_stream, XKV_MTL_EXACT_THREADS, size, false).step.n = tokens_of_span();
        }
        const bool rest = a.lead[XKV_MTL_K] < a.rank[XKV_MTL_K] || a.lead[XKV_MTL_V] < a.rank[XKV_MTL_V];
        for (int round = 0; round < XKV_MTL_N_ROUND && a.n_split > 0 && rest; ++round) {
            const int n    = tile(true);
            const int size = xkv_mtl_lay_out_chunk(n, dim(XKV_MTL_K), n_chunk(), true).size;
            launch("least", a.n_query, a.n_stream, 1, XKV_MTL_WARP, 0).step.round                              = round;
            launch("refine", a.n_split, xkv_mtl_parts(a.n_query, n), a.n_stream, XKV_MTL_THREADS, size).step.n = n;
        }
        launch("merge", a.n_query, a.n_stream, 1, XKV_MTL_THREADS, xkv_mtl_lay_out_merge(a.rank[XKV_MTL_V], dim(XKV_MTL_V)).size);
    }

    void batch(xkv_mtl_step step, int n_row) {
        const int n_tile = xkv_mtl_parts(a.n_tps * n_gqa(), XKV_MTL_ROWS);
        if (step.stored) {
            const int n_col = xkv_mtl_parts(std::max(dim(XKV_MTL_K), dim(XKV_MTL_V)), XKV_MTL_COLS);
            launch("make", n_row / XKV_MTL_ROWS, n_col, 2 * a.n_head_kv, XKV_MTL_MAKE_THREADS, xkv_mtl_lay_out_make().size).step = step;
            launch("turn_back", n_row, a.n_head_kv, 1, XKV_MTL_WARP, 0).step                                                     = step;
        } else {
            launch("load_exact", n_row, a.n_head_kv, 1, XKV_MTL_WARP, 0).step = step;
        }
        launch("attend", n_tile, a.n_head_kv, 1, XKV_MTL_THREADS, xkv_mtl_lay_out_attend().size).step = step;
    }

    void prefill() {
        a.at_k     = take((size_t) a.n_head_kv * XKV_MTL_BATCH * dim(XKV_MTL_K), 4);
        a.at_v     = take((size_t) a.n_head_kv * XKV_MTL_BATCH * dim(XKV_MTL_V), 4);
        a.at_total = take(a.n_query, 8);

        const int n_stored = a.n_frame * n_chunk();
        for (int s = 0; s < a.n_stream; ++s) {
            launch("begin", a.n_query, 1, 1, XKV_MTL_WARP, 0, s > 0).step.stream = s;
            for (int first = 0; first < n_stored; first += XKV_MTL_BATCH) {
                const int n = std::min(XKV_MTL_BATCH, n_stored - first);
                batch({ 0, 0, s, first, n, 1 }, n);
            }
            for (int first = 0; first < a.n_exact; first += XKV_MTL_BATCH) {
                const int n = std::min(XKV_MTL_BATCH, a.n_exact - first);
                batch({ 0, 0, s, first, n, 0 }, xkv_mtl_parts(n, 8) * 8);
            }
            launch("end", a.n_query, 1, 1, XKV_MTL_WARP, 0).step.stream = s;
        }
    }
};

} // namespace

xkv_mtl_plan xkv_mtl_make_plan(const xkv_mtl_args & args, const xkv_mtl_shape & shape, int n_core) {
    planner p{ { args, 0, {}, {} }, shape, n_core };
    p.a.n_query = p.a.n_head * p.a.n_tps;
    if (p.a.n_tps > XKV_MTL_MAX_QUERY) {
        p.prefill();
    } else {
        p.decode();
    }
    return std::move(p.plan);
}
