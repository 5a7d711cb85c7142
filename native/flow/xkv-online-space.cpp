// The space in which new bases are looked for, the eigenproblem there, and what changes with the bases.

#include "flow/xkv-online.h"

#include "base/xkv-error.h"
#include "base/xkv-lapack.h"
#include "base/xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

// share of the calibrated variance that an update weighs against the prompt; the rest lies in directions nobody keeps
static const float XKV_ONLINE_PRIOR = 0.98f;

// numbers of a plain store in which new directions are looked for; the covariance has all
static const size_t XKV_ONLINE_SKETCH = 2 * 1024 * 1024;

// directions that one update can add
static const uint32_t XKV_ONLINE_NEW = 64;

// Directions of the old basis in an eigenproblem, whose time grows with the third power. Of a wide basis, those in the middle are
// left out: what the main directions share with them by then is little.
static const uint32_t XKV_ONLINE_LARGE = 512;

// x [n, dim] in a space of rows [n_row, dim]; in one of all numbers as it is
static xkv_floats xkv_into(const xkv_floats & x, const xkv_floats & rows, bool unit, int n, int n_row, int dim, int n_thread) {
    return unit ? x : xkv_mul_rows(x, rows, n, n_row, dim, n_thread);
}

// whether a basis of a rank, looked for among a quarter more directions than it has, needs more of them
static bool xkv_is_wide(uint32_t rank, uint32_t dim) {
    return std::min(dim, rank + rank / 4) > XKV_ONLINE_LARGE;
}

size_t xkv_online_bases::space_bytes(const problem & pr, uint32_t rank, uint32_t n_token) const {
    const size_t dim   = store.groups()[pr.ig].dim[pr.kd];
    const size_t n_new = setup.sidecar.calibrated() ? XKV_ONLINE_NEW : std::max(rank, XKV_ONLINE_NEW);
    const size_t n     = std::min<size_t>(dim, XKV_ONLINE_LARGE + n_new);
    const size_t n_dir = std::max<size_t>(rank, store.plain() ? n : store.groups()[pr.ig].rank[pr.kd]);
    // Tokens as f16, with the old basis and what is looked for outside it; with rows, covariance, what rows and old directions
    // share, and what is added to the covariance or its eigenvectors; the new directions and the basis that takes them up, a layer
    // of it twice.
    const size_t find  = (n_dir + n_token / 2 + std::max<size_t>(2 * n_new + XKV_ONLINE_BLOCK, n)) * dim;
    const size_t solve = (n + n_token / 2 + XKV_ONLINE_BLOCK) * dim + 3 * n * n;
    const size_t write = (n + n_dir + n_dir / store.groups()[pr.ig].layers.size()) * dim;
    return std::max({ find, solve, write }) * sizeof(float);
}

uint32_t xkv_online_bases::rank_of(const problem & pr, const xkv_store::layout * next) const {
    return (next ? next->groups : store.groups())[pr.ig].rank[pr.kd];
}

xkv_floats xkv_online_bases::rows_of(uint32_t stream, const problem & pr, uint32_t n_row, int n_thread) const {
    const auto & gr = store.groups()[pr.ig];

    auto res = store.plain() ? setup.sidecar.basis(pr.ig, pr.kd, n_row) : store.get_basis(pr.kd, pr.ig, stream, n_thread);
    res.resize((size_t) n_row * gr.dim[pr.kd], 0.0f);
    return res;
}

void xkv_online_bases::build_rows(uint32_t stream, const problem & pr, uint32_t rank, space & sp) const {
    const uint32_t dim  = store.groups()[pr.ig].dim[pr.kd];
    const bool     cold = !setup.sidecar.calibrated();
    const bool     wide = xkv_is_wide(rank, dim);

    // the old basis: of a plain store, all numbers, or as many calibrated directions as are worth it
    sp.unit   = store.plain() && dim <= XKV_ONLINE_LARGE;
    sp.n_dir  = std::min(store.plain() ? (cold && !sp.unit ? 0 : dim) : states[stream].n_dir[pr.kd][pr.ig], wide ? rank : XKV_ONLINE_LARGE);
    sp.n_main = sp.i_last = sp.n_old = sp.n = sp.n_dir;
    if (!sp.unit) {
        const uint32_t n_token = (store.plain() ? tables[stream].n_token() : 0) + sp.tokens.size() / dim;
        const uint32_t n_most  = XKV_ONLINE_LARGE + XKV_ONLINE_NEW;
        const uint32_t n_cold  = wide ? std::max(XKV_ONLINE_LARGE / 2, n_most - std::min(n_most, sp.n_dir)) : rank;
        const uint32_t n_new   = std::min({ dim - sp.n_dir, n_token, cold ? n_cold : XKV_ONLINE_NEW });
        if (wide) {
            // no more than there are: the first bases without calibration come from new directions alone
            const uint32_t n_last = std::min(sp.n_dir, n_new - std::min(n_new, rank - sp.n_dir));
            sp.n_main             = std::min(sp.n_dir - n_last, n_most - n_new - n_last);
            sp.i_last             = sp.n_dir - n_last;
            sp.n_old              = sp.n_main + n_last;
        }
        sp.n    = sp.n_old + n_new;
        sp.rows = rows_of(stream, pr, sp.n_dir, sp.n_thread);

        // the main directions of what it misses in the tokens
        const auto fresh = n_new > 0 ? sketch(stream, pr, n_new, sp) : xkv_floats();
        for (uint32_t i = sp.n_main; i < sp.n_old; ++i) {
            std::copy_n(sp.rows.begin() + (size_t) sp.place(i) * dim, dim, sp.rows.begin() + (size_t) i * dim);
        }
        // what is between is read again when it is needed: it is large
        sp.rows.resize((size_t) sp.n_old * dim);
        sp.rows.reserve((size_t) sp.n * dim);
        sp.rows.insert(sp.rows.end(), fresh.begin(), fresh.end());
    }
    sp.n_best = std::min(sp.n, sp.n_main + rank - sp.i_last);
}

xkv_floats xkv_online_bases::sketch(uint32_t stream, const problem & pr, uint32_t n_new, const space & sp) const {
    const uint32_t dim = store.groups()[pr.ig].dim[pr.kd];

    std::mt19937                    rng(pr.ig);
    std::normal_distribution<float> normal;
    xkv_floats                      omega((size_t) dim * n_new);
    std::generate(omega.begin(), omega.end(), [&] { return normal(rng); });

    // twice, since a stored basis is not quite orthonormal
    const auto leave_out_old = [&](xkv_floats & x) {
        for (int i = 0; i < 2 && sp.n_dir > 0; ++i) {
            xkv_add_mul(xkv_mul_rows(x, sp.rows, n_new, sp.n_dir, dim, sp.n_thread), sp.rows, n_new, sp.n_dir, dim, -1.0f, x, sp.n_thread);
        }
    };
    // The second moments of tokens outside the old basis, times random directions [n_new, dim]. What is outside is taken of the
    // few directions instead of the many tokens.
    leave_out_old(omega);
    xkv_floats   res(omega.size(), 0.0f);
    const size_t n_chunk = XKV_ONLINE_SKETCH / ((size_t) store.n_chunk * dim);
    each_exact(stream, pr, sp.tokens, n_chunk, sp.n_thread, [&](const xkv_floats & z, uint32_t n) {
        xkv_add_cross(xkv_mul_rows(z, omega, n, n_new, dim, sp.n_thread), z, n, n_new, dim, res, sp.n_thread);
    });
    leave_out_old(res);
    return res;
}

xkv_floats xkv_online_bases::stored_coef(uint32_t stream, const problem & pr, const std::vector<uint32_t> & chunks, size_t first, size_t n,
                                         int n_thread) const {
    const size_t        rank = store.groups()[pr.ig].rank[pr.kd];
    std::vector<size_t> begin(n + 1, 0); // of a chunk's tokens
    for (size_t j = 0; j < n; ++j) {
        begin[j + 1] = begin[j] + tables[stream][chunks[first + j]].n;
    }
    xkv_floats res(begin[n] * rank);
    xkv_parallel(n, n_thread, [&](size_t j) {
        const auto part = store.get_coef(pr.kd, pr.ig, stream, chunks[first + j]);
        std::copy_n(part.begin(), (begin[j + 1] - begin[j]) * rank, res.begin() + begin[j] * rank);
    });
    return res;
}

void xkv_online_bases::build_cov(uint32_t stream, const problem & pr, space & sp) const {
    const uint32_t dim     = store.groups()[pr.ig].dim[pr.kd];
    const uint32_t n_token = sp.tokens.size() / dim;

    sp.cov.assign((size_t) sp.n * sp.n, 0.0f);

    // The tokens that were stored since the last update are known in the old directions only: in the new ones, the tokens
    // at hand stand for them.
    const uint32_t n_stored = tables[stream].n_token();
    const uint32_t n_in     = states[stream].n_in;
    const uint32_t n_since  = store.plain() ? 0 : std::min(n_stored, n_in - std::min(n_in, states[stream].n_update[pr.kd][pr.ig]));
    const float    scale    = n_token > 0 ? sqrtf((float) (n_since + n_token) / n_token) : 1.0f;
    each_block(sp.tokens, dim, [&](const xkv_floats & z, uint32_t n) {
        auto x = xkv_into(z, sp.rows, sp.unit, n, sp.n, dim, sp.n_thread); // [n, sp.n]
        for (uint32_t i = 0; i < n; ++i) {
            std::for_each(x.begin() + (size_t) i * sp.n + sp.n_old, x.begin() + (size_t) (i + 1) * sp.n,
                          [scale](float & v) { v *= scale; });
        }
        xkv_add_gram(x, n, sp.n, sp.cov, sp.n_thread);
    });
    sp.tokens = xkv_halves();
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
    for (float sum = 0.0f; n_row < dim && sum < XKV_ONLINE_PRIOR * total; ++n_row) {
        sum += variance[n_row];
    }
    for (uint32_t first = 0; first < n_row; first += XKV_ONLINE_BLOCK) {
        const uint32_t n    = std::min(XKV_ONLINE_BLOCK, n_row - first);
        auto           rows = setup.sidecar.basis(pr.ig, pr.kd, n, first);
        for (uint32_t i = 0; i < n; ++i) {
            const float f = sqrtf(variance[first + i] * setup.config.n_prior);
            std::for_each(rows.begin() + (size_t) i * dim, rows.begin() + (size_t) (i + 1) * dim, [f](float & v) { v *= f; });
        }
        xkv_add_gram(xkv_into(rows, sp.rows, sp.unit, n, sp.n, dim, sp.n_thread), n, sp.n, sp.cov, sp.n_thread);
    }
}

void xkv_online_bases::add_stored(uint32_t stream, const problem & pr, space & sp) const {
    const auto &   gr     = store.groups()[pr.ig];
    const uint32_t dim    = gr.dim[pr.kd];
    const uint32_t rank   = gr.rank[pr.kd];
    const auto     chunks = tables[stream].used();
    if (chunks.empty() || (!store.plain() && sp.n_old == 0)) {
        return;
    }
    const size_t n_block = std::max<size_t>(1, XKV_ONLINE_BLOCK / store.n_chunk);
    const auto   each    = [&](auto && use) { // coefficients [n, rank]
        for (size_t i = 0; i < chunks.size(); i += n_block) {
            const auto coef = stored_coef(stream, pr, chunks, i, std::min(n_block, chunks.size() - i), sp.n_thread);
            use(coef, (int) (coef.size() / rank));
        }
    };
    if (store.plain()) {
        each([&](const xkv_floats & coef, int n) {
            xkv_add_gram(xkv_into(coef, sp.rows, sp.unit, n, sp.n, dim, sp.n_thread), n, sp.n, sp.cov, sp.n_thread);
        });
        return;
    }
    xkv_floats sum((size_t) sp.n_old * sp.n_old, 0.0f);
    each([&](const xkv_floats & coef, int n) {
        xkv_floats part((size_t) n * sp.n_old);
        for (int i = 0; i < n; ++i) {
            const auto row = coef.begin() + (size_t) i * rank;
            std::copy_n(row, sp.n_main, part.begin() + (size_t) i * sp.n_old);
            std::copy_n(row + sp.i_last, sp.n_old - sp.n_main, part.begin() + (size_t) i * sp.n_old + sp.n_main);
        }
        xkv_add_gram(part, n, sp.n_old, sum, sp.n_thread);
    });
    xkv_mirror(sum, sp.n_old);
    // the new rows are orthogonal to the old directions
    for (uint32_t first = 0; first < sp.n_old; first += XKV_ONLINE_BLOCK) {
        const uint32_t n     = std::min(XKV_ONLINE_BLOCK, sp.n_old - first);
        const auto     begin = sp.meet.begin() + (size_t) first * sp.n_old;
        const auto     part  = xkv_mul_rows({ begin, begin + (size_t) n * sp.n_old }, sum, n, sp.n_old, sp.n_old, sp.n_thread);
        xkv_floats     turned((size_t) n * sp.n, 0.0f);
        xkv_add_mul_rows(part, sp.meet, n, sp.n, sp.n_old, turned, sp.n_thread);
        std::transform(turned.begin(), turned.end(), sp.cov.begin() + (size_t) first * sp.n, sp.cov.begin() + (size_t) first * sp.n,
                       std::plus<float>());
    }
}

bool xkv_online_bases::pays(uint32_t stream, const problem & pr, const space & sp, const xkv_store::layout & next) const {
    const auto kept_now = kept(store.groups(), pr);
    const auto kept_new = kept(next.groups, pr);
    if (store.plain() || !setup.sidecar.calibrated()) {
        return true;
    }

    double gain = 0.0;
    double lost = 0.0;
    // directions that stay as they are add to neither
    for (uint32_t i = 0; i < std::max(sp.n_best, sp.n_old); ++i) {
        const uint32_t r = sp.place(i);
        if (r >= kept_new.size()) {
            continue;
        }
        gain += i < sp.n_best ? sp.values[i] * kept_new[r] : 0.0;
        gain -= i < sp.n_old ? sp.variance[i] * kept_new[r] : 0.0;
        // what keeps its place and type is not rounded again
        lost += i < sp.n_old && kept_now[r] == kept_new[r] ? sp.variance[i] * (1.0f - kept_now[r]) : 0.0;
    }
    return gain * store.stage_slots()[next.stage] > lost * tables[stream].n_token();
}

xkv_recode xkv_online_bases::carry_over(uint32_t stream, const problem & pr, const xkv_store::layout & next, int n_thread) {
    const uint32_t rank = rank_of(pr, &next);
    if (store.plain() && !setup.sidecar.calibrated()) {
        xkv_throw(XKV_STATUS_INTERNAL, "no basis for %c of group %u: its eigenproblem has no solution, and there is no calibration",
                  pr.kd == kind::K ? 'K' : 'V', pr.ig);
    }
    auto & n_dir = states[stream].n_dir[pr.kd][pr.ig];
    n_dir        = std::min({ rank, n_dir, store.groups()[pr.ig].dim[pr.kd] });
    return xkv_keep_basis(store, pr.kd, pr.ig, stream, rows_of(stream, pr, rank, n_thread), next, n_thread);
}

bool xkv_online_bases::orthonormalize(const problem & pr, space & sp) const {
    const uint32_t dim = store.groups()[pr.ig].dim[pr.kd];
    if (sp.unit) {
        return true;
    }
    return xkv_orthonormalize(sp.rows, sp.n, dim, store.plain() ? 0 : sp.n_old, sp.meet);
}

bool xkv_online_bases::solve(space & sp) {
    auto & x = sp.cov;
    if (sp.n == 0) {
        return false;
    }
    for (uint32_t i = 0; i < sp.n; ++i) {
        sp.variance.push_back(x[(size_t) i * sp.n + i]);
    }
    if (!xkv_eigen(x, sp.n, sp.n_best, sp.values, sp.combos)) {
        return false;
    }
    x = xkv_floats();
    return std::all_of(sp.combos.begin(), sp.combos.end(), [](float v) { return std::isfinite(v); });
}

xkv_recode xkv_online_bases::apply(uint32_t stream, const problem & pr, space & sp, const xkv_store::layout * next) {
    const uint32_t dim  = store.groups()[pr.ig].dim[pr.kd];
    const uint32_t rank = rank_of(pr, next);

    xkv_floats rows; // the new basis [rank, dim]
    {
        xkv_floats best = sp.unit ? std::move(sp.combos) : xkv_floats((size_t) sp.n_best * dim, 0.0f);
        if (!sp.unit) {
            xkv_add_mul(sp.combos, sp.rows, sp.n_best, sp.n, dim, 1.0f, best, sp.n_thread);
            sp.rows = xkv_floats();
            rows    = rows_of(stream, pr, sp.n_dir, sp.n_thread);
        }
        rows.resize((size_t) rank * dim, 0.0f);
        for (uint32_t i = 0; i < sp.n_best; ++i) {
            std::copy_n(best.begin() + (size_t) i * dim, dim, rows.begin() + (size_t) sp.place(i) * dim);
        }
    }
    store.set_basis(pr.kd, pr.ig, stream, rows, next, sp.n_thread);

    xkv_recode turn;
    if (store.plain()) {
        turn = xkv_recode_all(std::move(rows), rank, dim);
    } else if (sp.n_old > 0) {
        rows = xkv_floats();
        turn.rows.resize((size_t) sp.n_best * sp.n_old, 0.0f);
        xkv_add_mul(sp.combos, sp.meet, sp.n_best, sp.n, sp.n_old, 1.0f, turn.rows, sp.n_thread);
        sp.combos = xkv_floats();
        sp.meet   = xkv_floats();
        for (uint32_t i = 0; i < std::max(sp.n_best, sp.n_old); ++i) {
            if (i < sp.n_old) {
                turn.from.push_back(sp.place(i));
            }
            if (i < sp.n_best) {
                turn.to.push_back(sp.place(i));
            }
        }
    }
    states[stream].n_dir[pr.kd][pr.ig] = std::max(std::min(rank, sp.n_dir), sp.place(sp.n_best - 1) + 1);
    return turn;
}
