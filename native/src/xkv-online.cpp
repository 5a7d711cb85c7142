#include "xkv-online.h"

#include "xkv-cache.h"
#include "xkv-codec.h"
#include "xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <numeric>

// An update pays when the error is this much above the calibrated one, as a share of that and of the variance; below,
// re-coding costs as much as it gains.
static const float XKV_ONLINE_EXCESS     = 0.05f;
static const float XKV_ONLINE_EXCESS_MIN = 0.002f;

// of spaces at a time
static const size_t XKV_ONLINE_BYTES = 64*1024*1024;

static float xkv_mean(const std::vector<float> & x) {
    return std::accumulate(x.begin(), x.end(), 0.0f)/x.size();
}

xkv_online_bases::xkv_online_bases(llama_kv_cache_xkv & cache, const xkv_flush & flush) : cache(cache), flush(flush), states(cache.store->n_stream) {
    const auto & store = *cache.store;

    for (auto kd : { kind::K, kind::V }) {
        for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
            problems.push_back({ kd, ig });
        }
    }
    expect();
    for (uint32_t s = 0; s < states.size(); ++s) {
        reset(s);
    }
}

void xkv_online_bases::expect() {
    expected.clear();
    for (const auto & pr : problems) {
        const auto spectrum = cache.sidecar->spectrum(pr.ig, pr.kd);
        const auto weight   = kept(pr);

        double total = 0.0;
        double lost  = 0.0;
        for (size_t i = 0; i < spectrum.size(); ++i) {
            total += spectrum[i];
            lost  += spectrum[i]*(i < weight.size() ? 1.0f - weight[i] : 1.0f);
        }
        expected.push_back(total > 0.0 ? lost/total : 0.0);
    }
}

std::vector<float> xkv_online_bases::kept(const problem & pr) const {
    std::vector<float> res;
    for (const auto & seg : cache.store->groups()[pr.ig].segments[pr.kd]) {
        res.insert(res.end(), seg.rank, 1.0f - xkv_noise(seg.type));
    }
    return res;
}

void xkv_online_bases::reset(uint32_t stream) {
    auto & st = states[stream];
    st = {};
    st.info.expected = xkv_mean(expected);
    // few tokens say little beside the calibration, and an early update costs as much as a later one
    st.n_next        = cache.sidecar->calibrated() ? cache.config.n_prior/2 : 0;
    for (const auto & pr : problems) {
        const auto & gr = cache.store->groups()[pr.ig];
        st.n_update[pr.kd].push_back(0);
        st.n_dir   [pr.kd].push_back(cache.sidecar->calibrated() ? std::min(gr.rank[pr.kd], gr.dim[pr.kd]) : 0);
    }
}

std::vector<uint32_t> xkv_online_bases::stored_chunks(uint32_t stream) const {
    std::vector<uint32_t> res;
    const auto & chunks = cache.get_chunks(stream);
    for (uint32_t ic = 0; ic < chunks.size(); ++ic) {
        if (chunks[ic].n > 0) {
            res.push_back(ic);
        }
    }
    return res;
}

uint32_t xkv_online_bases::n_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs) const {
    uint32_t n = 0;
    for (uint32_t ic : stored_chunks(stream)) {
        n += cache.get_chunks(stream)[ic].n;
    }
    for (const auto & job : jobs) {
        n += job.cells.size();
    }
    return n;
}

void xkv_online_bases::enter_stage(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const xkv_store::layout & next) {
    auto & st = states[stream];

    const state before = st;
    try {
        st.n_seen = n_tokens(stream, jobs);
        st.n_next = 2*st.n_seen;
        update(lctx, stream, jobs, problems, &next);
        st.info.n_update++;
    } catch (...) {
        st = before; // the store stays in its stage
        throw;
    }
    graph.release();
}

void xkv_online_bases::observe(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs) {
    auto & st = states[stream];

    const bool     cold = !cache.sidecar->calibrated();
    const uint32_t n    = n_tokens(stream, jobs);

    if (4*n < st.n_next) {
        st.n_next = 2*n; // tokens were removed
    }
    // a stage with a next one keeps nearly all, and the bases are computed anew at its end
    if (n < st.n_next || (!cold && cache.store->stage() + 1 < cache.store->n_stage())) {
        return;
    }
    st.n_next = 2*n;
    st.n_seen = n;

    st.info.n_check++;

    std::vector<problem> due;
    std::vector<float>   residual;
    for (size_t i = 0; i < problems.size(); ++i) {
        residual.push_back(cold && st.info.n_update == 0 ? 1.0f : measure(lctx, stream, jobs, problems[i]));
        if (cold || residual[i] > expected[i] + std::max(XKV_ONLINE_EXCESS*expected[i], XKV_ONLINE_EXCESS_MIN)) {
            due.push_back(problems[i]);
        }
    }
    st.info.residual = xkv_mean(residual);
    st.info.expected = xkv_mean(expected);
    if (!due.empty()) {
        update(lctx, stream, jobs, due, nullptr);
        st.info.n_update++;
    }
    graph.release();
}

ggml_tensor * xkv_online_bases::input_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr) {
    std::vector<int64_t> cells;
    std::vector<int64_t> origin;
    for (const auto & job : jobs) {
        cells .insert(cells .end(), job.cells.begin(), job.cells.end());
        origin.insert(origin.end(), job.cells.size(), -job.pos);
    }
    ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, std::move(cells));
    ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, std::move(origin));
    return flush.build_group(graph, pr.kd, pr.ig, stream, inp_cells, inp_origin);
}

float xkv_online_bases::measure(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr) {
    const auto & store = *cache.store;
    const auto & gr    = store.groups()[pr.ig];

    graph.begin(lctx, 64 + XKV_ONLINE_NODES_PER_LAYER*store.layers.size());
    ggml_context * ctx = graph.ctx();

    ggml_tensor * z = input_tokens(stream, jobs, pr);                                                    // [dim, n]
    ggml_tensor * b = graph.input(gr.dim[pr.kd], gr.rank[pr.kd], store.get_basis(pr.kd, pr.ig, stream));
    ggml_tensor * w = graph.input(gr.rank[pr.kd], 1, kept(pr));
    ggml_tensor * a = ggml_mul_mat(ctx, b, z);                                                           // [rank, n]

    ggml_tensor * total = ggml_sum(ctx, ggml_sqr(ctx, z));
    ggml_tensor * keep  = ggml_sum(ctx, ggml_mul(ctx, ggml_sqr(ctx, a), w));
    graph.output(total);
    graph.output(keep);
    graph.run();

    const float t = graph.read(total)[0];
    return t > 0.0f ? std::max(0.0f, 1.0f - graph.read(keep)[0]/t) : 0.0f;
}

void xkv_online_bases::update(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs,
                              const std::vector<problem> & due, const xkv_store::layout * next) {
    cache.store->own_bases(stream);

    // as many at a time as there are threads for eigenproblems and memory for spaces
    const size_t n_thread = std::max(1, lctx->get_cparams().n_threads_batch);

    size_t n_bytes = 0;
    for (const auto & pr : due) {
        n_bytes = std::max(n_bytes, space_bytes(rank_of(pr, next)));
    }
    const size_t n_most = std::max<size_t>(1, std::min(n_thread, XKV_ONLINE_BYTES/n_bytes));
    for (size_t first = 0; first < due.size(); first += n_most) {
        const size_t n = std::min(n_most, due.size() - first);

        std::vector<space> spaces(n);
        for (size_t i = 0; i < n; ++i) {
            build_space(lctx, stream, jobs, due[first + i], rank_of(due[first + i], next), spaces[i]);
        }
        std::vector<char> solved(n);
        xkv_parallel(n, n_thread, [&](size_t i) { solved[i] = solve(rank_of(due[first + i], next), spaces[i]); });
        for (size_t i = 0; i < n; ++i) {
            const auto & pr = due[first + i];
            if (!solved[i]) {
                LLAMA_LOG_WARN("%s: %c of group %u keeps its basis: its eigenproblem has no solution\n", __func__,
                               pr.kd == kind::K ? 'K' : 'V', pr.ig);
                if (!next) {
                    continue;
                }
                keep(rank_of(pr, next), spaces[i]);
            }
            apply(lctx, stream, pr, spaces[i], next);
            states[stream].n_update[pr.kd][pr.ig] = states[stream].n_seen;
        }
    }
}
