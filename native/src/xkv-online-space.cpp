// The space in which new bases are looked for, the eigenproblem there, and what changes with the bases.

#include "xkv-online.h"

#include "xkv-cache.h"
#include "xkv-lapack.h"
#include "xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

// share of the calibrated variance that an update weighs against the prompt; the rest lies in directions nobody keeps
static const float XKV_ONLINE_PRIOR = 0.98f;

// directions that one update can add
static const uint32_t XKV_ONLINE_NEW = 64;

// what is added to the squared lengths of directions that are nearly dependent
static const float XKV_ONLINE_RIDGE = 1e-3f;

// Eigenproblems up to this size cost little; a larger one leaves out what the next basis will hardly have room for.
static const uint32_t XKV_ONLINE_SMALL = 1024;

// stored tokens that are projected anew in one graph: bounds its scratch
static const uint32_t XKV_ONLINE_BLOCK = 1024;

static ggml_tensor * xkv_transposed(ggml_context * ctx, ggml_tensor * x) {
    return ggml_cont(ctx, ggml_transpose(ctx, x));
}

// directions of the old basis that a basis of a rank is looked for in
static uint32_t xkv_n_kept(uint32_t rank) {
    return std::max(XKV_ONLINE_SMALL, rank + rank/4);
}

size_t xkv_online_bases::space_bytes(uint32_t rank) {
    const size_t n = xkv_n_kept(rank) + XKV_ONLINE_NEW;
    return 6*n*n*sizeof(float); // rows, gram and its copy, covariance, LAPACK's two
}

uint32_t xkv_online_bases::rank_of(const problem & pr, const xkv_store::layout * next) const {
    return (next ? next->groups : cache.store->groups())[pr.ig].rank[pr.kd];
}

void xkv_online_bases::build_space(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr, uint32_t rank, space & sp) {
    const auto &   store = *cache.store;
    const auto &   gr    = store.groups()[pr.ig];
    const uint32_t dim   = gr.dim[pr.kd];
    const auto &   st    = states[stream];

    uint32_t n_token = 0;
    for (const auto & job : jobs) {
        n_token += job.cells.size();
    }

    // the old basis, and the main directions of what it misses in the tokens
    sp.n_old = std::min(st.n_dir[pr.kd][pr.ig], xkv_n_kept(rank));
    sp.rows  = store.get_basis(pr.kd, pr.ig, stream);
    sp.rows.resize((size_t) sp.n_old*dim);

    const uint32_t n_room = dim - std::min(dim, sp.n_old);
    const uint32_t n_new  = std::min({ n_room, n_token, cache.sidecar->calibrated() ? XKV_ONLINE_NEW : gr.rank[pr.kd] });
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
    const uint32_t rank    = store.groups()[pr.ig].rank[pr.kd];
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

void xkv_online_bases::keep(uint32_t rank, space & sp) {
    sp.combos.assign((size_t) rank*sp.n, 0.0f);
    for (uint32_t r = 0; r < std::min(rank, sp.n); ++r) {
        sp.combos[(size_t) r*sp.n + r] = 1.0f;
    }
}

bool xkv_online_bases::solve(uint32_t rank, space & sp) {
    auto & x = sp.cov;
    if (sp.n == 0) {
        return false;
    }
    if (!xkv_eigen(x, sp.gram, sp.n)) {
        // new directions can be nearly dependent on old ones, which are rounded
        auto gram = sp.gram;
        for (uint32_t i = 0; i < sp.n; ++i) {
            gram[(size_t) i*sp.n + i] += XKV_ONLINE_RIDGE;
        }
        if (!xkv_eigen(x, std::move(gram), sp.n)) {
            return false;
        }
    }
    x.resize((size_t) std::min(rank, sp.n)*sp.n);
    if (std::any_of(x.begin(), x.end(), [](float v) { return !std::isfinite(v); })) {
        return false;
    }
    x.resize((size_t) rank*sp.n, 0.0f);
    sp.combos = std::move(x);
    return true;
}

void xkv_online_bases::apply(llama_context * lctx, uint32_t stream, const problem & pr, const space & sp, const xkv_store::layout * next) {
    auto &         store    = *cache.store;
    const uint32_t dim      = store.groups()[pr.ig].dim[pr.kd];
    const uint32_t rank_old = store.groups()[pr.ig].rank[pr.kd];
    const uint32_t rank     = rank_of(pr, next);

    graph.begin(lctx, 64);
    ggml_context * ctx  = graph.ctx();
    ggml_tensor *  x    = graph.input(sp.n, rank, sp.combos);
    ggml_tensor *  rows = ggml_mul_mat(ctx, xkv_transposed(ctx, graph.input(dim, sp.n, sp.rows)), x); // [dim, rank]
    // old coefficients to new ones: combos times the gram of all rows with the old ones
    ggml_tensor *  turn = ggml_mul_mat(ctx, graph.input(sp.n, sp.n, sp.gram), x);                     // [n, rank]
    graph.output(rows);
    graph.output(turn);
    graph.run();

    store.set_basis(pr.kd, pr.ig, stream, graph.read(rows), next);

    auto all = graph.read(turn);
    std::vector<float> old((size_t) rank*rank_old, 0.0f); // [rank of new, rank of old]
    for (uint32_t r = 0; r < rank; ++r) {
        std::copy_n(all.begin() + (size_t) r*sp.n, sp.n_old, old.begin() + (size_t) r*rank_old);
    }

    const auto   chunks  = stored_chunks(stream);
    const size_t n_block = XKV_ONLINE_BLOCK/store.n_chunk;
    const int    n_thr   = lctx->get_cparams().n_threads_batch;
    const size_t n_coef  = (size_t) store.n_chunk*rank_old;
    for (size_t i = 0; i < chunks.size(); i += n_block) {
        const size_t n_now = std::min<size_t>(n_block, chunks.size() - i);

        std::vector<float> coef(n_now*n_coef);
        xkv_parallel(n_now, n_thr, [&](size_t j) {
            const auto part = store.get_coef(pr.kd, pr.ig, stream, chunks[i + j]);
            std::copy(part.begin(), part.end(), coef.begin() + j*n_coef);
        });
        graph.begin(lctx, 64);
        ggml_tensor * a = graph.input(rank_old, n_now*store.n_chunk, std::move(coef));
        ggml_tensor * b = ggml_mul_mat(graph.ctx(), graph.input(rank_old, rank, old), a);
        graph.output(b);
        graph.run();

        const auto data = graph.read(b);
        xkv_parallel(n_now, n_thr, [&](size_t j) {
            store.set_coef(pr.kd, pr.ig, stream, chunks[i + j], data.data() + j*store.n_chunk*rank, next);
        });
    }
    states[stream].n_dir[pr.kd][pr.ig] = std::min(rank, sp.n);
}
