// XKV_ATTN on CUDA: which kernels run over what. Each run's memory is laid out here. Launches follow from shapes alone, so that a
// graph of them can be kept.

#include "xkv-attn.cuh"

#include "xkv-cu-attend.cuh"
#include "xkv-cu-lead.cuh"
#include "xkv-cu-make.cuh"
#include "xkv-cu-merge.cuh"
#include "xkv-cu-refine.cuh"
#include "xkv-cu-values.cuh"

#include <algorithm>

// bytes of the sums of all splits, and of the rows of a span, if it takes fewer splits and shorter spans to stay below
static const size_t XKV_CU_SUMS = 32 << 20;
static const size_t XKV_CU_SPAN = 32 << 20;

static const int XKV_CU_N_ROUND = 3;
static const int XKV_CU_N_EXACT = 16;
static const int XKV_CU_N_DEEP  = 16;

static int xkv_cu_parts(int64_t n, int64_t size) {
    return (int) ((n + size - 1) / size);
}

// bytes that f takes of an arena
template <typename F> static size_t xkv_cu_size(F && f) {
    xkv_cu_arena at = { nullptr };
    f(at);
    return at.at - (char *) nullptr;
}

static size_t xkv_cu_lead_shared(const xkv_cu_attn & a, int n, int n_chunk) {
    return xkv_cu_size([&](xkv_cu_arena & at) { xkv_cu_lead_block(a, xkv_cu_decode(), 0, 0, n, n_chunk, at); });
}

static size_t xkv_cu_refine_shared(const xkv_cu_attn & a, int n) {
    return xkv_cu_size([&](xkv_cu_arena & at) { xkv_cu_refine_block(a, xkv_cu_decode(), 0, 0, n, at); });
}

static bool xkv_cu_fits(size_t shared) {
    return shared <= XKV_CU_SHARED + 16 * XKV_GUARD_BYTES; // as many guard zones as there may be
}

// queries of a block of threads: few where that makes more blocks for a card with nothing else to do
static int xkv_cu_tile_of(const xkv_cu_attn & a, int n_sm, bool refine) {
    int n = XKV_CU_TILE;
    while (n > 8 && !xkv_cu_fits(refine ? xkv_cu_refine_shared(a, n) : xkv_cu_lead_shared(a, n, 1))) {
        n /= 2;
    }
    while (n > 8 && a.n_frame * a.n_stream * xkv_cu_parts(a.n_head * a.n_tps, n) < 2 * n_sm) {
        n /= 2;
    }
    return n;
}

// chunks whose queries go through the lead together
static int xkv_cu_ahead_of(const xkv_cu_attn & a, int n, int n_split) {
    int res = xkv_cu_lead_block::one_slice(a) ? XKV_CU_AHEAD : 1;
    while (res > 1 && (!xkv_cu_fits(xkv_cu_lead_shared(a, n, res)) || res / 2 >= xkv_cu_parts(a.n_frame, n_split))) {
        res /= 2;
    }
    return res;
}

// exact tokens of a span
static int xkv_cu_exact_of(const xkv_cu_attn & a) {
    return xkv_cu_parts(xkv_cu_parts(a.n_exact, XKV_CU_N_EXACT), XKV_CU_EXACT_BLOCK) * XKV_CU_EXACT_BLOCK;
}

static bool xkv_cu_has_rest(const xkv_cu_attn & a) {
    return a.n_frame > 0 && (a.lead[XKV_CU_K] < a.rank[XKV_CU_K] || a.lead[XKV_CU_V] < a.rank[XKV_CU_V]);
}

static int xkv_cu_v_slices(const xkv_cu_attn & a) {
    return xkv_cu_parts(a.rank[XKV_CU_V], XKV_CU_V_SLICE);
}

static xkv_cu_decode xkv_cu_lay_out_decode(const xkv_cu_attn & a, int n_sm, xkv_cu_arena & at) {
    xkv_cu_decode b = {};
    b.n_query       = a.n_head * a.n_tps;
    b.n_exact       = a.n_exact > 0 ? xkv_cu_parts(a.n_exact, xkv_cu_exact_of(a)) : 0;
    b.lead_v        = a.lead[XKV_CU_V];

    const size_t n_query = (size_t) b.n_query * a.n_stream;
    const auto   within  = [](size_t bytes, size_t each) { return (int) std::max<size_t>(1, bytes / std::max<size_t>(each, 1)); };
    if (a.n_frame > 0) {
        const int n_block = xkv_cu_parts(b.n_query, xkv_cu_tile_of(a, n_sm, false)) * a.n_stream;
        const int most    = std::min(a.n_frame, within(XKV_CU_SUMS, n_query * b.lead_v * sizeof(float)));
        const int n       = std::min(most, xkv_cu_parts(2 * n_sm, n_block));
        b.n_split         = xkv_cu_parts(a.n_frame, xkv_cu_parts(a.n_frame, n));
    }
    b.sums        = at.take<float>(b.n_split * n_query * b.lead_v);
    b.sums_max    = at.take<float>(b.n_split * n_query);
    b.state       = at.take<float2>(b.n_split * n_query);
    b.exact       = at.take<float>(b.n_exact * n_query * a.dim[XKV_CU_V]);
    b.exact_state = at.take<float2>(b.n_exact * n_query);
    if (a.n_frame > 0) {
        b.share = at.take<float>(n_query * a.n_frame * (a.n_chunk / XKV_CU_FINE));
    }
    if (xkv_cu_has_rest(a)) {
        const int  rank   = xkv_cu_rows::width(a.rank[XKV_CU_K]);
        const bool ints[] = { a.coef_ints[XKV_CU_K], a.coef_ints[XKV_CU_V] };
        const bool real[] = { a.coef_floats[XKV_CU_K], a.coef_floats[XKV_CU_V] };

        const size_t bytes =
            xkv_cu_rows::size(rank, ints[0], real[0]) + 2 * xkv_cu_rows::size(a.n_chunk, ints[1], real[1]) + 3 * sizeof(int);
        const size_t deep  = n_query * a.rank[XKV_CU_V] * sizeof(float);
        const int    tiles = xkv_cu_parts(b.n_query, XKV_CU_TILE) * a.n_stream;

        b.n_span = std::min(a.n_frame, within(XKV_CU_SPAN, bytes * n_query));
        b.n_deep = std::min(std::min(b.n_span, XKV_CU_N_DEEP), xkv_cu_parts(2 * n_sm, xkv_cu_v_slices(a) * tiles));
        b.n_deep = std::min(b.n_deep, within(XKV_CU_SUMS, deep));

        const size_t n_row = b.n_span * n_query;
        b.least            = at.take<float2>(n_query);
        b.fine             = at.take<uint32_t>(n_row);
        b.list             = at.take<int>(n_row);
        b.count            = at.take<int>((size_t) a.n_head_kv * a.n_stream);
        b.y.take(at, n_row, rank, ints[0], real[0]);
        b.fresh.take(at, n_row, a.n_chunk, ints[1], real[1]);
        b.taken.take(at, n_row, a.n_chunk, ints[1], real[1]);
        b.top      = at.take<float>(n_row);
        b.deep     = at.take<float>(b.n_deep * n_query * a.rank[XKV_CU_V]);
        b.deep_max = at.take<float>(b.n_deep * n_query * xkv_cu_v_slices(a));
    }
    return b;
}

static xkv_cu_prefill xkv_cu_lay_out_prefill(const xkv_cu_attn & a, xkv_cu_arena & at) {
    const size_t   n = (size_t) a.n_head_kv * XKV_CU_BATCH;
    xkv_cu_prefill b;
    b.n_query = a.n_head * a.n_tps;
    b.made    = at.take<float>(n * a.dim[XKV_CU_K]);
    b.k       = at.take<half>(n * a.dim[XKV_CU_K]);
    b.v       = at.take<half>(n * a.dim[XKV_CU_V]);
    b.state   = at.take<float2>((size_t) xkv_cu_parts(a.dim[XKV_CU_V], XKV_CU_PIECE) * b.n_query);
    return b;
}

size_t xkv_cu_attn_scratch(const xkv_cu_attn & a, int n_sm) {
    return xkv_cu_size([&](xkv_cu_arena & at) {
        if (a.n_tps > XKV_CU_MAX_QUERY) {
            xkv_cu_lay_out_prefill(a, at);
        } else {
            xkv_cu_lay_out_decode(a, n_sm, at);
        }
    });
}

// blocks with more than the least share, in spans of chunks
static void xkv_cu_run_round(const xkv_cu_attn & a, const xkv_cu_decode & b, int n_sm, int round, cudaStream_t stream) {
    const int n_tile = xkv_cu_parts(b.n_query, XKV_CU_TILE);
    const int n      = xkv_cu_tile_of(a, n_sm, true);
    const int m      = a.n_tps * a.n_gqa;
    const int rank   = a.rank[XKV_CU_K];

    const size_t size_mark    = xkv_cu_size([](xkv_cu_arena & at) { at.take<int>(1); });
    const size_t size_refine  = xkv_cu_refine_shared(a, n);
    const size_t size_values  = xkv_cu_size([](xkv_cu_arena & at) { xkv_cu_values_shared{ at }; });
    const size_t size_queries = xkv_cu_size([&](xkv_cu_arena & at) {
        xkv_cu_rows().take(at, XKV_CU_TILE, xkv_cu_rows::width(a.dim[XKV_CU_K]), a.basis_ints[XKV_CU_K], a.basis_floats[XKV_CU_K]);
    });
    // pieces of work there are at most, by whole strips of each segment
    const int n_strip = xkv_cu_parts(rank, XKV_CU_ROUND) + a.n_segment[XKV_CU_K];
    const int n_piece = xkv_cu_parts(b.n_span * m, XKV_CU_TILE) * xkv_cu_parts(n_strip, XKV_CU_STRIPS);
    const int n_block = std::min(n_piece, xkv_cu_parts(2 * n_sm, a.n_head_kv * a.n_stream));

    XKV_LAUNCH(xkv_cu_least, dim3(b.n_query, a.n_stream), XKV_CU_WARP, 0, stream, a, b, round);
    for (int first = 0; first < a.n_frame; first += b.n_span) {
        const int end = std::min(first + b.n_span, a.n_frame);
        XKV_LAUNCH(xkv_cu_mark, dim3(a.n_head_kv, a.n_stream), XKV_CU_LIST_THREADS, size_mark, stream, a, b, first, end);
        XKV_LAUNCH(xkv_cu_project_list, dim3(n_block, a.n_head_kv, a.n_stream), XKV_CU_THREADS, size_queries, stream, a, b, first);
        XKV_LAUNCH(xkv_cu_refine, dim3(b.n_split, xkv_cu_parts(b.n_query, n), a.n_stream), XKV_CU_THREADS, size_refine, stream, a, b, n,
                   first, end);
        XKV_LAUNCH(xkv_cu_values, dim3(xkv_cu_v_slices(a), b.n_deep, n_tile * a.n_stream), XKV_CU_THREADS, size_values, stream, a, b, first,
                   end, round == 0 && first == 0);
    }
}

static void xkv_cu_run_decode(const xkv_cu_attn & a, int n_sm, void * scratch, cudaStream_t stream) {
    xkv_cu_arena        at     = { (char *) scratch };
    const xkv_cu_decode b      = xkv_cu_lay_out_decode(a, n_sm, at);
    const int           n_unit = xkv_cu_parts(a.n_tps * a.n_gqa, 8);

    if (b.n_split > 0) {
        const int    n       = xkv_cu_tile_of(a, n_sm, false);
        const int    n_chunk = xkv_cu_ahead_of(a, n, b.n_split);
        const size_t size    = xkv_cu_lead_shared(a, n, n_chunk);
        XKV_LAUNCH(xkv_cu_lead, dim3(b.n_split, xkv_cu_parts(b.n_query, n), a.n_stream), XKV_CU_THREADS, size, stream, a, b, n, n_chunk);
    }
    if (b.n_exact > 0) {
        const int    n    = xkv_cu_exact_of(a);
        const size_t size = xkv_cu_size([&](xkv_cu_arena & own) { xkv_cu_exact_shared(a, own); });
        XKV_LAUNCH(xkv_cu_exact_span, dim3(b.n_exact, a.n_head_kv * n_unit, a.n_stream), XKV_CU_EXACT_THREADS, size, stream, a, b, n);
    }
    for (int round = 0; round < XKV_CU_N_ROUND && xkv_cu_has_rest(a); ++round) {
        xkv_cu_run_round(a, b, n_sm, round, stream);
    }
    const size_t size = xkv_cu_size([&](xkv_cu_arena & own) { xkv_cu_merge_block(a, b, 0, 0, 0, own); });
    XKV_LAUNCH(xkv_cu_merge, dim3(xkv_cu_parts(a.dim[XKV_CU_V], XKV_CU_MERGE_ROWS), a.n_head_kv * n_unit, a.n_stream), XKV_CU_THREADS, size,
               stream, a, b);
}

static void xkv_cu_run_prefill(const xkv_cu_attn & a, void * scratch, cudaStream_t stream) {
    xkv_cu_arena         at = { (char *) scratch };
    const xkv_cu_prefill b  = xkv_cu_lay_out_prefill(a, at);

    const size_t size_panels = xkv_cu_size([](xkv_cu_arena & own) { xkv_cu_panels{ own }; });
    const size_t size_attend = xkv_cu_size([&](xkv_cu_arena & own) { xkv_cu_attend_shared(a, own); });

    const int n_warp   = xkv_cu_attend_warps(a);
    const int n_piece  = xkv_cu_parts(a.dim[XKV_CU_V], XKV_CU_PIECE);
    const int n_stored = a.n_frame * a.n_chunk;

    const dim3 rows(xkv_cu_parts(a.n_tps * a.n_gqa, n_warp * XKV_CU_ROWS), a.n_head_kv, n_piece);
    for (int s = 0; s < a.n_stream; ++s) {
        XKV_LAUNCH(xkv_cu_begin, xkv_cu_parts(n_piece * b.n_query, XKV_CU_THREADS), XKV_CU_THREADS, 0, stream, b, n_piece * b.n_query);
        for (int first = 0; first < n_stored; first += XKV_CU_BATCH) {
            const int n      = std::min(XKV_CU_BATCH, n_stored - first);
            const int blocks = std::max(xkv_cu_make_tiles(XKV_CU_K, n, a.dim[XKV_CU_K]), xkv_cu_make_tiles(XKV_CU_V, n, a.dim[XKV_CU_V]));
            XKV_LAUNCH(xkv_cu_make, dim3(blocks, 2 * a.n_head_kv), XKV_CU_THREADS, size_panels, stream, a, b, s, first, n);
            XKV_LAUNCH(xkv_cu_turn_back, dim3(n, a.n_head_kv), XKV_CU_EXACT_THREADS, 0, stream, a, b, s, first);
            XKV_LAUNCH(xkv_cu_attend, rows, n_warp * XKV_CU_WARP, size_attend, stream, a, b, s, first, n, true);
        }
        for (int first = 0; first < a.n_exact; first += XKV_CU_BATCH) {
            const int n    = std::min(XKV_CU_BATCH, a.n_exact - first);
            const int upto = xkv_cu_parts(n, XKV_CU_STEP) * XKV_CU_STEP;
            XKV_LAUNCH(xkv_cu_load_exact, dim3(upto, a.n_head_kv), XKV_CU_EXACT_THREADS, 0, stream, a, b, s, first);
            XKV_LAUNCH(xkv_cu_attend, rows, n_warp * XKV_CU_WARP, size_attend, stream, a, b, s, first, n, false);
        }
        XKV_LAUNCH(xkv_cu_end, b.n_query, XKV_CU_EXACT_THREADS, 0, stream, a, b, s);
    }
}

void xkv_cu_attn_run(const xkv_cu_attn & a, int n_sm, void * scratch, cudaStream_t stream) {
    if (a.n_tps > XKV_CU_MAX_QUERY) {
        xkv_cu_run_prefill(a, scratch, stream);
    } else {
        xkv_cu_run_decode(a, n_sm, scratch, stream);
    }
}
