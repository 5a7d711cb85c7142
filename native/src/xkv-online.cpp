#include "xkv-online.h"

#include "xkv-cache.h"
#include "xkv-codec.h"
#include "xkv-lapack.h"
#include "xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

// An update pays when the error is this much above the calibrated one, as a share of that and of the variance; below,
// re-coding costs as much as it gains.
static const float XKV_ONLINE_EXCESS     = 0.05f;
static const float XKV_ONLINE_EXCESS_MIN = 0.002f;

// share of the calibrated variance that an update weighs against the prompt; the rest lies in directions nobody keeps
static const float XKV_ONLINE_PRIOR = 0.98f;

// directions that one update can add
static const uint32_t XKV_ONLINE_NEW = 64;

// stored tokens that are projected anew in one graph: bounds its scratch
static const uint32_t XKV_ONLINE_BLOCK = 1024;

static const size_t XKV_ONLINE_NODES_PER_LAYER = 16;

static ggml_tensor * xkv_transposed(ggml_context * ctx, ggml_tensor * x) {
    return ggml_cont(ctx, ggml_transpose(ctx, x));
}

static float xkv_mean(const std::vector<float> & x) {
    return std::accumulate(x.begin(), x.end(), 0.0f)/x.size();
}

xkv_online_bases::xkv_online_bases(llama_kv_cache_xkv & cache, const xkv_flush & flush) : cache(cache), flush(flush), states(cache.store->n_stream) {
    const auto & store = *cache.store;

    for (auto kd : { kind::K, kind::V }) {
        for (uint32_t ig = 0; ig < store.groups.size(); ++ig) {
            problems.push_back({ kd, ig });

            const auto spectrum = cache.sidecar->spectrum(ig, kd);
            const auto weight   = kept(problems.back());

            double total = 0.0;
            double lost  = 0.0;
            for (size_t i = 0; i < spectrum.size(); ++i) {
                total += spectrum[i];
                lost  += spectrum[i]*(i < weight.size() ? 1.0f - weight[i] : 1.0f);
            }
            expected.push_back(total > 0.0 ? lost/total : 0.0);
        }
    }

    for (uint32_t s = 0; s < states.size(); ++s) {
        reset(s);
    }
}

std::vector<float> xkv_online_bases::kept(const problem & pr) const {
    std::vector<float> res;
    for (const auto & seg : cache.store->groups[pr.ig].segments[pr.kd]) {
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
        const auto & gr = cache.store->groups[pr.ig];
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

void xkv_online_bases::observe(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs) {
    auto & st = states[stream];

    uint32_t n = 0;
    for (uint32_t ic : stored_chunks(stream)) {
        n += cache.get_chunks(stream)[ic].n;
    }
    for (const auto & job : jobs) {
        n += job.cells.size();
    }
    if (n < st.n_next) {
        return;
    }
    st.n_next = 2*n;
    st.n_seen = n;

    const bool cold = !cache.sidecar->calibrated();

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
    if (!due.empty()) {
        update(lctx, stream, jobs, due);
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
    const auto & gr    = store.groups[pr.ig];

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
                              const std::vector<problem> & due) {
    cache.store->own_bases(stream);

    // as many at a time as there are threads for eigenproblems: each takes some megabytes
    const size_t n_thread = std::max(1, lctx->get_cparams().n_threads_batch);
    for (size_t first = 0; first < due.size(); first += n_thread) {
        const size_t n = std::min(n_thread, due.size() - first);

        std::vector<space> spaces(n);
        for (size_t i = 0; i < n; ++i) {
            build_space(lctx, stream, jobs, due[first + i], spaces[i]);
        }
        std::vector<char> solved(n);
        xkv_parallel(n, n_thread, [&](size_t i) { solved[i] = solve(due[first + i], spaces[i]); });
        for (size_t i = 0; i < n; ++i) {
            const auto & pr = due[first + i];
            if (solved[i]) {
                apply(lctx, stream, pr, spaces[i]);
                states[stream].n_update[pr.kd][pr.ig] = states[stream].n_seen;
            } else {
                LLAMA_LOG_WARN("%s: %c of group %u keeps its basis: its eigenproblem has no solution\n", __func__,
                               pr.kd == kind::K ? 'K' : 'V', pr.ig);
            }
        }
    }
}

void xkv_online_bases::build_space(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr, space & sp) {
    const auto &   store = *cache.store;
    const auto &   gr    = store.groups[pr.ig];
    const uint32_t dim   = gr.dim[pr.kd];
    const auto &   st    = states[stream];

    uint32_t n_token = 0;
    for (const auto & job : jobs) {
        n_token += job.cells.size();
    }

    // the old basis, and the main directions of what it misses in the tokens
    sp.n_old = st.n_dir[pr.kd][pr.ig];
    sp.rows  = store.get_basis(pr.kd, pr.ig, stream);
    sp.rows.resize((size_t) sp.n_old*dim);

    const uint32_t n_room = dim - std::min(dim, sp.n_old);
    const uint32_t n_new  = std::min({ n_room, n_token, sp.n_old > 0 ? XKV_ONLINE_NEW : gr.rank[pr.kd] });
    if (n_new > 0) {
        graph.begin(lctx, 64 + XKV_ONLINE_NODES_PER_LAYER*store.layers.size());
        ggml_context * ctx = graph.ctx();

        std::mt19937                    rng(pr.ig);
        std::normal_distribution<float> normal;
        std::vector<float>              omega((size_t) n_token*n_new);
        std::generate(omega.begin(), omega.end(), [&] { return normal(rng); });

        ggml_tensor * z = input_tokens(stream, jobs, pr); // [dim, n_token]
        if (sp.n_old > 0) {
            ggml_tensor * b = graph.input(dim, sp.n_old, sp.rows);
            ggml_tensor * a = ggml_mul_mat(ctx, b, z);                              // [n_old, n_token]
            z = ggml_sub(ctx, z, ggml_mul_mat(ctx, xkv_transposed(ctx, b), a));
        }
        ggml_tensor * zt = xkv_transposed(ctx, z);                                  // [n_token, dim]
        ggml_tensor * y  = graph.input(n_token, n_new, std::move(omega));
        y = ggml_mul_mat(ctx, zt, y);                                               // [dim, n_new]
        y = ggml_mul_mat(ctx, z,  y);                                               // [n_token, n_new], a power iteration
        y = ggml_mul_mat(ctx, zt, y);
        graph.output(y);
        graph.run();

        auto rows = graph.read(y);
        if (xkv_orthonormalize(rows, n_new, dim)) {
            sp.rows.insert(sp.rows.end(), rows.begin(), rows.end());
        }
    }
    sp.n = sp.rows.size()/dim;

    // Covariances in that space. The tokens that were stored since the last update are known in the old directions only:
    // in the new ones, the tokens at hand stand for them.
    graph.begin(lctx, 64 + XKV_ONLINE_NODES_PER_LAYER*store.layers.size());
    ggml_context * ctx = graph.ctx();

    const auto chunks = stored_chunks(stream);

    uint32_t n_stored = 0;
    for (uint32_t ic : chunks) {
        n_stored += cache.get_chunks(stream)[ic].n;
    }
    std::vector<float> scale(sp.n, 1.0f);
    std::fill(scale.begin() + sp.n_old, scale.end(), sqrtf((float) (n_stored - std::min(n_stored, st.n_update[pr.kd][pr.ig]) + n_token)/n_token));

    ggml_tensor * s    = graph.input(dim, sp.n, sp.rows);
    ggml_tensor * gram = ggml_mul_mat(ctx, s, s);

    ggml_tensor * x = ggml_mul_mat(ctx, s, input_tokens(stream, jobs, pr)); // [n, n_token]
    x = ggml_mul(ctx, x, graph.input(sp.n, 1, std::move(scale)));
    x = xkv_transposed(ctx, x);
    ggml_tensor * cov = ggml_mul_mat(ctx, x, x);

    if (cache.sidecar->calibrated() && cache.config.n_prior > 0) {
        const auto  variance = cache.sidecar->spectrum(pr.ig, pr.kd);
        const float total    = std::accumulate(variance.begin(), variance.end(), 0.0f);

        uint32_t n_row = 0;
        for (float sum = 0.0f; n_row < dim && sum < XKV_ONLINE_PRIOR*total; ++n_row) {
            sum += variance[n_row];
        }
        auto rows = cache.sidecar->basis(pr.ig, pr.kd, n_row);
        for (uint32_t i = 0; i < n_row; ++i) {
            const float f = sqrtf(variance[i]*cache.config.n_prior);
            std::for_each(rows.begin() + (size_t) i*dim, rows.begin() + (size_t) (i + 1)*dim, [f](float & v) { v *= f; });
        }
        ggml_tensor * p = ggml_mul_mat(ctx, graph.input(dim, n_row, std::move(rows)), s); // [n_row, n]
        cov = ggml_add(ctx, cov, ggml_mul_mat(ctx, p, p));
    }
    graph.output(gram);
    graph.output(cov);
    graph.run();
    sp.gram = graph.read(gram);
    sp.cov  = graph.read(cov);

    if (sp.n_old > 0 && !chunks.empty()) {
        add_stored(lctx, stream, pr, chunks, sp);
    }
}

void xkv_online_bases::add_stored(llama_context * lctx, uint32_t stream, const problem & pr, const std::vector<uint32_t> & chunks, space & sp) {
    const auto &   store   = *cache.store;
    const uint32_t rank    = store.groups[pr.ig].rank[pr.kd];
    const uint32_t n_block = XKV_ONLINE_BLOCK/store.n_chunk;

    std::vector<float> sum((size_t) sp.n_old*sp.n_old, 0.0f); // of a a^T
    for (size_t i = 0; i < chunks.size(); i += n_block) {
        const size_t n_now = std::min<size_t>(n_block, chunks.size() - i);

        std::vector<float> coef;
        for (size_t j = i; j < i + n_now; ++j) {
            auto part = store.get_coef(pr.kd, pr.ig, stream, chunks[j]);
            part.resize((size_t) cache.get_chunks(stream)[chunks[j]].n*rank);
            coef.insert(coef.end(), part.begin(), part.end());
        }
        graph.begin(lctx, 64);
        ggml_context * ctx = graph.ctx();

        const int64_t n = coef.size()/rank;
        ggml_tensor * a = graph.input(rank, n, std::move(coef));
        a = xkv_transposed(ctx, ggml_view_2d(ctx, a, sp.n_old, n, a->nb[1], 0));
        ggml_tensor * c = ggml_mul_mat(ctx, a, a);
        graph.output(c);
        graph.run();
        const auto part = graph.read(c);
        std::transform(part.begin(), part.end(), sum.begin(), sum.begin(), std::plus<float>());
    }

    // to the space, with the gram of old directions with all: [n_old, n]
    std::vector<float> g((size_t) sp.n*sp.n_old);
    for (uint32_t r = 0; r < sp.n; ++r) {
        std::copy_n(sp.gram.begin() + (size_t) r*sp.n, sp.n_old, g.begin() + (size_t) r*sp.n_old);
    }
    graph.begin(lctx, 64);
    ggml_tensor * s = graph.input(sp.n_old, sp.n, std::move(g));
    ggml_tensor * t = ggml_mul_mat(graph.ctx(), graph.input(sp.n_old, sp.n_old, std::move(sum)), s); // [n_old, n]
    t = ggml_mul_mat(graph.ctx(), s, t);
    graph.output(t);
    graph.run();
    const auto part = graph.read(t);
    std::transform(part.begin(), part.end(), sp.cov.begin(), sp.cov.begin(), std::plus<float>());
}

bool xkv_online_bases::solve(const problem & pr, space & sp) const {
    const uint32_t rank = cache.store->groups[pr.ig].rank[pr.kd];

    std::vector<float> x;
    if (sp.n == 0 || !xkv_eigen(sp.cov, sp.gram, sp.n, x)) {
        return false;
    }
    x.resize((size_t) std::min(rank, sp.n)*sp.n);
    if (std::any_of(x.begin(), x.end(), [](float v) { return !std::isfinite(v); })) {
        return false;
    }
    x.resize((size_t) rank*sp.n, 0.0f);
    sp.combos = std::move(x);
    return true;
}

void xkv_online_bases::apply(llama_context * lctx, uint32_t stream, const problem & pr, const space & sp) {
    auto &         store = *cache.store;
    const auto &   gr    = store.groups[pr.ig];
    const uint32_t dim   = gr.dim[pr.kd];
    const uint32_t rank  = gr.rank[pr.kd];

    graph.begin(lctx, 64);
    {
        ggml_context * ctx  = graph.ctx();
        ggml_tensor *  x    = graph.input(sp.n, rank, sp.combos);
        ggml_tensor *  rows = ggml_mul_mat(ctx, xkv_transposed(ctx, graph.input(dim, sp.n, sp.rows)), x); // [dim, rank]
        // old coefficients to new ones: combos times the gram of all rows with the old ones
        ggml_tensor *  turn = ggml_mul_mat(ctx, graph.input(sp.n, sp.n, sp.gram), x);                     // [n, rank]
        graph.output(rows);
        graph.output(turn);
        graph.run();

        store.set_basis(pr.kd, pr.ig, stream, graph.read(rows));

        auto all = graph.read(turn);
        std::vector<float> old((size_t) rank*rank, 0.0f); // [rank of new, rank of old]
        for (uint32_t r = 0; r < rank; ++r) {
            std::copy_n(all.begin() + (size_t) r*sp.n, sp.n_old, old.begin() + (size_t) r*rank);
        }

        const auto   chunks  = stored_chunks(stream);
        const size_t n_block = XKV_ONLINE_BLOCK/store.n_chunk;
        const int    n_thr   = lctx->get_cparams().n_threads_batch;
        const size_t n_coef  = (size_t) store.n_chunk*rank;
        for (size_t i = 0; i < chunks.size(); i += n_block) {
            const size_t n_now = std::min<size_t>(n_block, chunks.size() - i);

            std::vector<float> coef(n_now*n_coef);
            xkv_parallel(n_now, n_thr, [&](size_t j) {
                const auto part = store.get_coef(pr.kd, pr.ig, stream, chunks[i + j]);
                std::copy(part.begin(), part.end(), coef.begin() + j*n_coef);
            });
            graph.begin(lctx, 64);
            ggml_tensor * a = graph.input(rank, n_now*store.n_chunk, std::move(coef));
            ggml_tensor * b = ggml_mul_mat(graph.ctx(), graph.input(rank, rank, old), a);
            graph.output(b);
            graph.run();

            const auto data = graph.read(b);
            xkv_parallel(n_now, n_thr, [&](size_t j) {
                store.set_coef(pr.kd, pr.ig, stream, chunks[i + j], data.data() + j*n_coef);
            });
        }
    }
    states[stream].n_dir[pr.kd][pr.ig] = std::min(rank, sp.n);
}
