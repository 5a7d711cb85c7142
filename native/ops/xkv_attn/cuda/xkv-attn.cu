// XKV_ATTN on CUDA: which kernels run over what. Each run's memory is laid out here.

#include "xkv-attn.cuh"

#include "xkv-cu-attend.cuh"
#include "xkv-cu-decode.cuh"

#include <algorithm>

// sums of all splits, if it takes fewer splits to stay below
static const size_t XKV_CU_SUMS = 32 << 20;

static const int XKV_CU_N_ROUND = 3;
static const int XKV_CU_N_SPAN  = 16;

static int xkv_cu_parts(int n, int size) {
    return (n + size - 1) / size;
}

// queries of a block of threads: few where that makes more blocks for a card with nothing else to do
static int xkv_cu_tile_of(const xkv_cu_attn & a, int n_sm, bool refine) {
    const int n_query = a.n_head * a.n_tps;
    const int room    = (int) ((XKV_CU_SHARED - 1024) / xkv_cu_chunk::query_bytes(a, refine)) / XKV_CU_VECS * XKV_CU_VECS;
    int       n       = std::min(std::max(room, XKV_CU_VECS), XKV_CU_TILE);
    while (n > XKV_CU_VECS && a.n_frame * a.n_stream * xkv_cu_parts(n_query, n) < 2 * n_sm) {
        n = (n / 2 + XKV_CU_VECS - 1) / XKV_CU_VECS * XKV_CU_VECS;
    }
    return n;
}

// exact tokens of a span
static int xkv_cu_span_of(const xkv_cu_attn & a) {
    return xkv_cu_parts(xkv_cu_parts(a.n_exact, XKV_CU_N_SPAN), XKV_CU_EXACT_BLOCK) * XKV_CU_EXACT_BLOCK;
}

static xkv_cu_decode xkv_cu_lay_out_decode(const xkv_cu_attn & a, int n_sm, xkv_cu_arena & at) {
    xkv_cu_decode b;
    b.n_query = a.n_head * a.n_tps;
    b.n_span  = a.n_exact > 0 ? xkv_cu_parts(a.n_exact, xkv_cu_span_of(a)) : 0;
    b.n_split = 0;
    if (a.n_frame > 0) {
        const int    n_block = xkv_cu_parts(b.n_query, xkv_cu_tile_of(a, n_sm, false)) * a.n_stream;
        const size_t bytes   = (size_t) b.n_query * a.n_stream * a.rank[XKV_CU_V] * sizeof(float);
        const int    most    = (int) std::min<size_t>(a.n_frame, std::max<size_t>(1, XKV_CU_SUMS / std::max<size_t>(bytes, 1)));
        const int    n       = std::min(most, xkv_cu_parts(4 * n_sm, n_block));
        b.n_split            = xkv_cu_parts(a.n_frame, xkv_cu_parts(a.n_frame, n));
    }
    const size_t n_query = (size_t) b.n_query * a.n_stream;

    b.sums        = at.take<float>(b.n_split * n_query * a.rank[XKV_CU_V]);
    b.state       = at.take<float4>(b.n_split * n_query);
    b.exact       = at.take<float>(b.n_span * n_query * a.dim[XKV_CU_V]);
    b.exact_state = at.take<float2>(b.n_span * n_query);
    b.share       = at.take<float>(n_query * a.n_frame * (a.n_chunk / XKV_CU_FINE));
    b.least       = at.take<float2>(n_query);
    return b;
}

static xkv_cu_prefill xkv_cu_lay_out_prefill(const xkv_cu_attn & a, xkv_cu_arena & at) {
    xkv_cu_prefill b;
    b.k     = at.take<float>((size_t) a.n_head_kv * XKV_CU_BATCH * a.dim[XKV_CU_K]);
    b.v     = at.take<float>((size_t) a.n_head_kv * XKV_CU_BATCH * a.dim[XKV_CU_V]);
    b.state = at.take<float2>((size_t) a.n_head * a.n_tps);
    return b;
}

size_t xkv_cu_attn_scratch(const xkv_cu_attn & a, int n_sm) {
    xkv_cu_arena at = { nullptr };
    if (a.n_tps > XKV_CU_MAX_QUERY) {
        xkv_cu_lay_out_prefill(a, at);
    } else {
        xkv_cu_lay_out_decode(a, n_sm, at);
    }
    return at.at - (char *) nullptr;
}

static size_t xkv_cu_chunk_shared(const xkv_cu_attn & a, const xkv_cu_decode & b, int n, bool refine) {
    xkv_cu_arena at = { nullptr };
    xkv_cu_chunk(a, b, 0, 0, n, refine, at);
    return at.at - (char *) nullptr;
}

static void xkv_cu_run_decode(const xkv_cu_attn & a, int n_sm, void * scratch, cudaStream_t stream) {
    xkv_cu_arena        at = { (char *) scratch };
    const xkv_cu_decode b  = xkv_cu_lay_out_decode(a, n_sm, at);

    if (b.n_split > 0) {
        const int    n    = xkv_cu_tile_of(a, n_sm, false);
        const size_t size = xkv_cu_chunk_shared(a, b, n, false);
        XKV_LAUNCH(xkv_cu_lead, dim3(b.n_split, xkv_cu_parts(b.n_query, n), a.n_stream), XKV_CU_THREADS, size, stream, a, b, n);
    }
    if (b.n_span > 0) {
        const int    n_unit = xkv_cu_parts(a.n_tps * a.n_gqa, XKV_CU_VECS);
        const int    n      = xkv_cu_span_of(a);
        xkv_cu_arena own    = { nullptr };
        xkv_cu_exact_shared(a, own);
        const size_t size = own.at - (char *) nullptr;
        XKV_LAUNCH(xkv_cu_exact_span, dim3(b.n_span, a.n_head_kv * n_unit, a.n_stream), XKV_CU_EXACT_THREADS, size, stream, a, b, n);
    }
    const bool rest = a.lead[XKV_CU_K] < a.rank[XKV_CU_K] || a.lead[XKV_CU_V] < a.rank[XKV_CU_V];
    for (int round = 0; round < XKV_CU_N_ROUND && b.n_split > 0 && rest; ++round) {
        const int    n    = xkv_cu_tile_of(a, n_sm, true);
        const size_t size = xkv_cu_chunk_shared(a, b, n, true);
        XKV_LAUNCH(xkv_cu_least, dim3(b.n_query, a.n_stream), XKV_CU_WARP, 0, stream, a, b, round);
        XKV_LAUNCH(xkv_cu_refine, dim3(b.n_split, xkv_cu_parts(b.n_query, n), a.n_stream), XKV_CU_THREADS, size, stream, a, b, n);
    }
    xkv_cu_arena own = { nullptr };
    own.take<float>(a.rank[XKV_CU_V]);
    own.take<float>(a.dim[XKV_CU_V]);
    XKV_LAUNCH(xkv_cu_merge, dim3(b.n_query, a.n_stream), XKV_CU_THREADS, own.at - (char *) nullptr, stream, a, b);
}

static void xkv_cu_run_prefill(const xkv_cu_attn & a, void * scratch, cudaStream_t stream) {
    xkv_cu_arena         at = { (char *) scratch };
    const xkv_cu_prefill b  = xkv_cu_lay_out_prefill(a, at);

    xkv_cu_arena panels = { nullptr };
    xkv_cu_panels{ panels };
    xkv_cu_arena attend = { nullptr };
    xkv_cu_attend_shared{ attend };
    const size_t size_panels = panels.at - (char *) nullptr;
    const size_t size_attend = attend.at - (char *) nullptr;

    const int n_query  = a.n_head * a.n_tps;
    const int n_stored = a.n_frame * a.n_chunk;
    const int n_col    = xkv_cu_parts(std::max(a.dim[XKV_CU_K], a.dim[XKV_CU_V]), XKV_CU_COLS);

    const dim3 rows(xkv_cu_parts(a.n_tps * a.n_gqa, XKV_CU_ROWS), a.n_head_kv);
    for (int s = 0; s < a.n_stream; ++s) {
        XKV_LAUNCH(xkv_cu_begin, xkv_cu_parts(n_query, XKV_CU_THREADS), XKV_CU_THREADS, 0, stream, b, n_query);
        for (int first = 0; first < n_stored; first += XKV_CU_BATCH) {
            const int n = std::min(XKV_CU_BATCH, n_stored - first);
            XKV_LAUNCH(xkv_cu_make, dim3(n / XKV_CU_ROWS, n_col, 2 * a.n_head_kv), XKV_CU_THREADS, size_panels, stream, a, b, s, first);
            XKV_LAUNCH(xkv_cu_turn_back, dim3(n, a.n_head_kv), XKV_CU_EXACT_THREADS, 0, stream, a, b, s, first);
            XKV_LAUNCH(xkv_cu_attend, rows, XKV_CU_THREADS, size_attend, stream, a, b, s, first, n, true);
        }
        for (int first = 0; first < a.n_exact; first += XKV_CU_BATCH) {
            const int n = std::min(XKV_CU_BATCH, a.n_exact - first);
            XKV_LAUNCH(xkv_cu_load_exact, dim3(n, a.n_head_kv), XKV_CU_EXACT_THREADS, 0, stream, a, b, s, first);
            XKV_LAUNCH(xkv_cu_attend, rows, XKV_CU_THREADS, size_attend, stream, a, b, s, first, n, false);
        }
        XKV_LAUNCH(xkv_cu_end, n_query, XKV_CU_EXACT_THREADS, 0, stream, a, b, s);
    }
}

void xkv_cu_attn_run(const xkv_cu_attn & a, int n_sm, void * scratch, cudaStream_t stream) {
    if (a.n_tps > XKV_CU_MAX_QUERY) {
        xkv_cu_run_prefill(a, scratch, stream);
    } else {
        xkv_cu_run_decode(a, n_sm, scratch, stream);
    }
}
