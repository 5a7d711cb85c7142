// The space in which new bases are looked for, the eigenproblem there, and what changes with the bases.

#include "flow/xkv-online.h"

#include "base/xkv-error.h"
#include "base/xkv-lapack.h"
#include "store/xkv-carry.h"

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

// Eigenproblems up to this size cost little; a larger one leaves out what the next basis will hardly have room for.
static const uint32_t XKV_ONLINE_SMALL = 512;

// x [n, dim] in a space of rows [n_row, dim]; in one of all numbers as it is
static xkv_floats xkv_into(const xkv_floats & x, const xkv_floats & rows, bool unit, int n, int n_row, int dim) {
    return unit ? x : xkv_mul_rows(x, rows, n, n_row, dim);
}

// directions of the old basis that a basis of a rank is looked for in
static uint32_t xkv_n_kept(uint32_t rank) {
    return std::max(XKV_ONLINE_SMALL, rank + rank/4);
}

size_t xkv_online_bases::space_bytes(uint32_t rank) {
    const size_t n = xkv_n_kept(rank) + XKV_ONLINE_NEW;
    return 4*n*n*sizeof(float); // rows, covariance, what is added to it, eigenvectors
}

uint32_t xkv_online_bases::rank_of(const problem & pr, const xkv_store::layout * next) const {
    return (next ? next->groups : store.groups())[pr.ig].rank[pr.kd];
}

xkv_floats xkv_online_bases::rows_of(uint32_t stream, const problem & pr, uint32_t n_row) const {
    const auto & gr    = store.groups()[pr.ig];

    auto res = store.plain() ? setup.sidecar.basis(pr.ig, pr.kd, n_row) : store.get_basis(pr.kd, pr.ig, stream);
    res.resize((size_t) n_row*gr.dim[pr.kd], 0.0f);
    return res;
}

void xkv_online_bases::build_rows(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr, uint32_t rank, space & sp) {
    const uint32_t dim   = store.groups()[pr.ig].dim[pr.kd];
    const bool     cold  = !setup.sidecar.calibrated();

    // the old basis: of a plain store, all numbers, or as many calibrated directions as are worth it
    sp.n_old = std::min(states[stream].n_dir[pr.kd][pr.ig], xkv_n_kept(rank));
    if (store.plain()) {
        sp.n_old = dim <= xkv_n_kept(rank) ? dim : cold ? 0 : xkv_n_kept(rank);
    }
    sp.n    = sp.n_old;
    sp.unit = store.plain() && sp.n == dim;
    if (sp.unit) {
        return;
    }
    sp.rows.reserve((size_t) (sp.n_old + XKV_ONLINE_NEW)*dim);
    {
        const auto rows = rows_of(stream, pr, sp.n_old);
        sp.rows.insert(sp.rows.end(), rows.begin(), rows.end());
    }

    // the main directions of what it misses in the tokens
    uint32_t n_token = store.plain() ? tables[stream].n_token() : 0;
    for (const auto & job : jobs) {
        n_token += job.cells.size();
    }
    const uint32_t n_new = std::min({ dim - std::min(dim, sp.n_old), n_token, cold ? rank : XKV_ONLINE_NEW });
    if (n_new > 0) {
        const auto rows = sketch(lctx, stream, jobs, pr, n_new, sp);
        sp.rows.insert(sp.rows.end(), rows.begin(), rows.end());
        sp.n += n_new;
    }
}

xkv_floats xkv_online_bases::sketch(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr,
                                            uint32_t n_new, const space & sp) {
    const uint32_t dim = store.groups()[pr.ig].dim[pr.kd];

    std::mt19937                    rng(pr.ig);
    std::normal_distribution<float> normal;
    xkv_floats              omega((size_t) dim*n_new);
    std::generate(omega.begin(), omega.end(), [&] { return normal(rng); });

    // the second moments of tokens z [n, dim] outside the old rows, times random directions [n_new, dim]
    xkv_floats res(omega.size(), 0.0f);
    each_exact(lctx, stream, jobs, pr, [&](const xkv_floats & z, uint32_t n) {
        xkv_floats rest = z;
        if (sp.n_old > 0) {
            xkv_add_mul(xkv_mul_rows(z, sp.rows, n, sp.n_old, dim), sp.rows, n, sp.n_old, dim, -1.0f, rest);
        }
        xkv_add_cross(xkv_mul_rows(rest, omega, n, n_new, dim), rest, n, n_new, dim, res);
    });
    return res;
}

xkv_floats xkv_online_bases::stored_coef(uint32_t stream, const problem & pr, const std::vector<uint32_t> & chunks, size_t first, size_t n) const {
    xkv_floats res;
    for (size_t j = first; j < first + n; ++j) {
        auto part = store.get_coef(pr.kd, pr.ig, stream, chunks[j]);
        part.resize((size_t) tables[stream][chunks[j]].n*store.groups()[pr.ig].rank[pr.kd]);
        res.insert(res.end(), part.begin(), part.end());
    }
    return res;
}

void xkv_online_bases::build_cov(uint32_t stream, const problem & pr, space & sp) const {
    const uint32_t dim     = store.groups()[pr.ig].dim[pr.kd];
    const uint32_t n_token = sp.tokens.size()/dim;

    sp.cov.assign((size_t) sp.n*sp.n, 0.0f);

    auto x = xkv_into(sp.tokens, sp.rows, sp.unit, n_token, sp.n, dim); // [n_token, n]
    sp.tokens = {};
    // The tokens that were stored since the last update are known in the old directions only: in the new ones, the tokens
    // at hand stand for them.
    if (!store.plain()) {
        const uint32_t n_since = tables[stream].n_token() - std::min(tables[stream].n_token(), states[stream].n_update[pr.kd][pr.ig]);
        const float    scale   = sqrtf((float) (n_since + n_token)/n_token);
        for (uint32_t i = 0; i < n_token; ++i) {
            for (uint32_t j = sp.n_old; j < sp.n; ++j) {
                x[(size_t) i*sp.n + j] *= scale;
            }
        }
    }
    xkv_add_gram(x, n_token, sp.n, sp.cov);
    add_prior(pr, sp);
    add_stored(stream, pr, sp);
    xkv_mirror(sp.cov, sp.n);
}

void xkv_online_bases::add_prior(const problem & pr, space & sp) const {
    if (!setup.sidecar.calibrated() || setup.config.n_prior == 0) {
        return;
    }
    const uint32_t dim      = store.groups()[pr.ig].dim[pr.kd];
    const auto     variance = setup.sidecar.spectrum(pr.ig, pr.kd);
    const float    total    = std::accumulate(variance.begin(), variance.end(), 0.0f);

    uint32_t n_row = 0;
    for (float sum = 0.0f; n_row < dim && sum < XKV_ONLINE_PRIOR*total; ++n_row) {
        sum += variance[n_row];
    }
    for (uint32_t first = 0; first < n_row; first += XKV_ONLINE_BLOCK) {
        const uint32_t n    = std::min(XKV_ONLINE_BLOCK, n_row - first);
        auto           rows = setup.sidecar.basis(pr.ig, pr.kd, n, first);
        for (uint32_t i = 0; i < n; ++i) {
            const float f = sqrtf(variance[first + i]*setup.config.n_prior);
            std::for_each(rows.begin() + (size_t) i*dim, rows.begin() + (size_t) (i + 1)*dim, [f](float & v) { v *= f; });
        }
        xkv_add_gram(xkv_into(rows, sp.rows, sp.unit, n, sp.n, dim), n, sp.n, sp.cov);
    }
}

void xkv_online_bases::add_stored(uint32_t stream, const problem & pr, space & sp) const {
    const auto &   gr     = store.groups()[pr.ig];
    const uint32_t dim    = gr.dim [pr.kd];
    const uint32_t rank   = gr.rank[pr.kd];
    const auto     chunks = tables[stream].used();
    if (!store.plain() && sp.n_old > 0) {
        // the space's rows times the directions of stored coefficients [n, n_old]
        sp.meet = xkv_mul_rows(sp.rows, rows_of(stream, pr, sp.n_old), sp.n, sp.n_old, dim);
    }
    if (chunks.empty() || (!store.plain() && sp.n_old == 0)) {
        return;
    }
    const size_t n_block = std::max<size_t>(1, XKV_ONLINE_BLOCK/store.n_chunk);
    const auto   each    = [&](auto && use) { // coefficients [n, rank]
        for (size_t i = 0; i < chunks.size(); i += n_block) {
            const auto coef = stored_coef(stream, pr, chunks, i, std::min(n_block, chunks.size() - i));
            use(coef, (int) (coef.size()/rank));
        }
    };
    if (store.plain()) {
        each([&](const xkv_floats & coef, int n) { xkv_add_gram(xkv_into(coef, sp.rows, sp.unit, n, sp.n, dim), n, sp.n, sp.cov); });
        return;
    }
    xkv_floats sum((size_t) sp.n_old*sp.n_old, 0.0f);
    each([&](const xkv_floats & coef, int n) { xkv_add_gram(coef, n, sp.n_old, sum, rank); });
    xkv_mirror(sum, sp.n_old);
    const auto t = xkv_mul_rows(sp.meet, sum, sp.n, sp.n_old, sp.n_old);
    sum = xkv_mul_rows(t, sp.meet, sp.n, sp.n, sp.n_old);
    std::transform(sum.begin(), sum.end(), sp.cov.begin(), sp.cov.begin(), std::plus<float>());
}

bool xkv_online_bases::pays(uint32_t stream, const problem & pr, const space & sp, const xkv_store::layout & next) const {
    const auto kept_now = kept(store.groups(), pr);
    const auto kept_new = kept(next.groups,    pr);
    if (store.plain() || !setup.sidecar.calibrated()) {
        return true;
    }

    double gain = 0.0;
    double lost = 0.0;
    for (uint32_t i = 0; i < kept_new.size(); ++i) {
        gain += i < sp.values.size() ? sp.values[i]*kept_new[i] : 0.0;
        gain -= i < sp.n_old ? sp.variance[i]*kept_new[i] : 0.0;
        // what keeps its place and type is not rounded again
        lost += i < sp.n_old && kept_now[i] == kept_new[i] ? sp.variance[i]*(1.0f - kept_now[i]) : 0.0;
    }
    return gain*store.stage_slots()[next.stage] > lost*tables[stream].n_token();
}

void xkv_online_bases::carry_over(llama_context * lctx, uint32_t stream, const problem & pr, const xkv_store::layout & next) {
    const uint32_t rank = rank_of(pr, &next);
    xkv_floats turn;
    if (store.plain()) {
        if (!setup.sidecar.calibrated()) {
            xkv_throw(XKV_STATUS_INTERNAL, "no basis for %c of group %u: its eigenproblem has no solution, and there is no calibration",
                      pr.kd == kind::K ? 'K' : 'V', pr.ig);
        }
        turn = setup.sidecar.basis(pr.ig, pr.kd, rank); // which the next stage begins with
    } else {
        store.set_basis(pr.kd, pr.ig, stream, rows_of(stream, pr, rank), &next);
    }
    xkv_carry_over(store, pr.kd, pr.ig, stream, tables[stream].used(), turn, &next, lctx->get_cparams().n_threads_batch);

    auto & n_dir = states[stream].n_dir[pr.kd][pr.ig];
    n_dir = std::min({ rank, n_dir, store.groups()[pr.ig].dim[pr.kd] });
}

bool xkv_online_bases::orthonormalize(const problem & pr, space & sp) const {
    return sp.unit || xkv_orthonormalize(sp.rows, sp.n, store.groups()[pr.ig].dim[pr.kd]);
}

bool xkv_online_bases::solve(uint32_t rank, space & sp) {
    auto & x = sp.cov;
    if (sp.n == 0) {
        return false;
    }
    for (uint32_t i = 0; i < sp.n; ++i) {
        sp.variance.push_back(x[(size_t) i*sp.n + i]);
    }
    const uint32_t n_new = std::min(rank, sp.n);
    if (!xkv_eigen(x, sp.n, n_new, sp.values, sp.combos)) {
        return false;
    }
    x = {};
    if (std::any_of(sp.combos.begin(), sp.combos.end(), [](float v) { return !std::isfinite(v); })) {
        return false;
    }
    sp.combos.resize((size_t) rank*sp.n, 0.0f);
    return true;
}

void xkv_online_bases::apply(llama_context * lctx, uint32_t stream, const problem & pr, space & sp, const xkv_store::layout * next) {
    const uint32_t dim      = store.groups()[pr.ig].dim[pr.kd];
    const uint32_t rank_old = store.groups()[pr.ig].rank[pr.kd];
    const uint32_t rank     = rank_of(pr, next);

    xkv_floats rows; // the new basis [rank, dim]
    if (sp.unit) {
        rows = std::move(sp.combos);
    } else {
        rows.assign((size_t) rank*dim, 0.0f);
        xkv_add_mul(sp.combos, sp.rows, rank, sp.n, dim, 1.0f, rows);
        sp.rows = {};
    }
    xkv_floats turn; // old coefficients to new ones [rank, rank_old]
    if (!store.plain() && sp.n_old > 0) {
        xkv_floats part((size_t) rank*sp.n_old, 0.0f);
        xkv_add_mul(sp.combos, sp.meet, rank, sp.n, sp.n_old, 1.0f, part);
        sp.meet   = {};
        sp.combos = {};
        turn.assign((size_t) rank*rank_old, 0.0f);
        for (uint32_t r = 0; r < rank; ++r) {
            std::copy_n(part.begin() + (size_t) r*sp.n_old, sp.n_old, turn.begin() + (size_t) r*rank_old);
        }
    }
    store.set_basis(pr.kd, pr.ig, stream, rows, next);
    if (store.plain()) {
        turn = std::move(rows);
    }
    if (!turn.empty()) {
        xkv_carry_over(store, pr.kd, pr.ig, stream, tables[stream].used(), turn, next, lctx->get_cparams().n_threads_batch);
    }
    states[stream].n_dir[pr.kd][pr.ig] = std::min(rank, sp.n);
}
