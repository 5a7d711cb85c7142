#include "flow/xkv-online.h"

#include "base/xkv-lapack.h"
#include "base/xkv-parallel.h"
#include "format/xkv-sidecar.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <iterator>
#include <numeric>

// New bases are worth their work when the error is this much above the calibrated one, as a share of that and at least of the
// variance. In the last stage, re-coding costs as much as it gains below that. At the plain stage's end, most of what other text
// of the calibration's kind loses is less than so much more, and nearly all that other kinds lose is more.
// Between stages with bases any more will do, since pays() weighs it.
static const float XKV_ONLINE_EXCESS       = 0.05f;
static const float XKV_ONLINE_EXCESS_PLAIN = 0.15f;
static const float XKV_ONLINE_EXCESS_MIN   = 0.0005f;

// of spaces at a time
static const size_t XKV_ONLINE_BYTES = 16 * 1024 * 1024;

// of a plain store are measured: a share of the variance needs no more
static const size_t XKV_ONLINE_MEASURE = 512 * 1024;

// adds the seconds that it lives to a sum
struct xkv_stopwatch {
    double &      sum;
    const int64_t start = ggml_time_us();

    explicit xkv_stopwatch(double & sum) : sum(sum) {}

    ~xkv_stopwatch() { sum += 1e-6 * (ggml_time_us() - start); }
};

static float xkv_mean(const xkv_floats & x) {
    return std::accumulate(x.begin(), x.end(), 0.0f) / x.size();
}

xkv_online_bases::xkv_online_bases(const xkv_setup & setup, xkv_store & store, const std::vector<xkv_chunk_table> & tables,
                                   const xkv_flush & flush) :
    setup(setup), store(store), tables(tables), flush(flush), states(store.n_stream) {
    for (auto kd : { kind::K, kind::V }) {
        for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
            if (store.groups()[ig].dim[kd] > 0) {
                problems.push_back({ kd, ig });
            }
        }
    }
    for (uint32_t s = 0; s < states.size(); ++s) {
        reset(s);
    }
}

float xkv_online_bases::expect(const std::vector<xkv_store::group> & groups, const problem & pr) const {
    const auto spectrum = setup.sidecar.spectrum(pr.ig, pr.kd);
    const auto weight   = kept(groups, pr);

    double total = 0.0;
    double lost  = 0.0;
    for (size_t i = 0; i < spectrum.size(); ++i) {
        total += spectrum[i];
        lost += spectrum[i] * (i < weight.size() ? 1.0f - weight[i] : 1.0f);
    }
    return total > 0.0 ? lost / total : 0.0;
}

xkv_floats xkv_online_bases::kept(const std::vector<xkv_store::group> & groups, const problem & pr) {
    xkv_floats res;
    for (const auto & seg : groups[pr.ig].segments[pr.kd]) {
        res.insert(res.end(), seg.rank, 1.0f - seg.noise);
    }
    return res;
}

void xkv_online_bases::reset(uint32_t stream) {
    auto & st = states[stream];
    st        = {};
    st.n_next = n_first();
    xkv_floats wanted;
    for (const auto & pr : problems) {
        const auto & gr = store.groups()[pr.ig];
        wanted.push_back(expect(store.groups(), pr));
        st.n_update[pr.kd].resize(store.groups().size(), 0);
        st.n_dir[pr.kd].resize(store.groups().size(), 0);
        st.n_dir[pr.kd][pr.ig] = setup.sidecar.calibrated() ? std::min(gr.rank[pr.kd], gr.dim[pr.kd]) : 0;
    }
    st.info.expected = xkv_mean(wanted);
}

void xkv_online_bases::count(uint32_t stream, const std::vector<xkv_flush::job> & jobs) {
    states[stream].n_in += xkv_job_cells(jobs).size();
}

uint32_t xkv_online_bases::n_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs) const {
    uint32_t n = tables[stream].n_token();
    for (const auto & job : jobs) {
        n += job.cells.size();
    }
    return n;
}

void xkv_online_bases::begin_stage(uint32_t stream, const std::vector<xkv_flush::job> & jobs) {
    auto & st = states[stream];
    st.n_seen = n_tokens(stream, jobs);
    st.n_next = 2 * st.n_seen;
    st.n_past = st.n_in + xkv_job_cells(jobs).size();
    st.info.n_check++;
    residual.clear();
    wanted.clear();
}

xkv_recodes xkv_online_bases::enter_stage(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs,
                                          const xkv_store::layout & next, uint32_t ig) {
    const xkv_stopwatch  watch(states[stream].info.seconds);
    std::vector<problem> list;
    std::copy_if(problems.begin(), problems.end(), std::back_inserter(list), [&](const problem & pr) { return pr.ig == ig; });

    xkv_recodes turns;
    const auto  applied = renew(lctx, stream, jobs, list, &next, &turns);
    for (const auto & pr : list) {
        if (std::none_of(applied.begin(), applied.end(), [&](const problem & a) { return a.kd == pr.kd; })) {
            turns[pr.kd] = carry_over(stream, pr, next, lctx->get_cparams().n_threads_batch);
        }
    }
    return turns;
}

bool xkv_online_bases::is_due(uint32_t stream, const problem & pr, const xkv_halves & tokens, const xkv_store::layout * next,
                              int n_thread) {
    auto &       st     = states[stream];
    const auto & groups = next ? next->groups : store.groups();
    const bool   cold   = !setup.sidecar.calibrated();

    wanted.push_back(expect(groups, pr));
    residual.push_back(cold && (store.plain() || st.info.n_update == 0) ? 1.0f : measure(stream, pr, tokens, groups, n_thread));
    st.info.residual = xkv_mean(residual);
    st.info.expected = xkv_mean(wanted);

    const float share  = store.plain() ? XKV_ONLINE_EXCESS_PLAIN : next ? 0.0f : XKV_ONLINE_EXCESS;
    const float excess = std::max(share * wanted.back(), XKV_ONLINE_EXCESS_MIN);
    return cold || residual.back() > wanted.back() + excess;
}

void xkv_online_bases::observe(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs) {
    auto & st = states[stream];

    const bool     cold = !setup.sidecar.calibrated();
    const uint32_t n    = n_tokens(stream, jobs);

    if (4 * n < st.n_next) {
        st.n_next = 2 * n; // tokens were removed
    }
    // a stage with a next one checks at its end
    // a context that shifts stays as large as it is, and forgets what its bases were made for
    const bool other = st.n_in + xkv_job_cells(jobs).size() >= st.n_past + std::max(n, n_first());
    if ((n < st.n_next && !other) || store.plain() || (!cold && store.stage() + 1 < store.n_stage())) {
        return;
    }
    const xkv_stopwatch watch(st.info.seconds);
    begin_stage(stream, jobs);
    renew(lctx, stream, jobs, problems, nullptr, nullptr);
}

ggml_tensor * xkv_online_bases::input_tokens(uint32_t stream, const std::vector<xkv_flush::job> & jobs, const problem & pr) {
    std::vector<int64_t> cells;
    std::vector<int64_t> origin;
    for (const auto & job : jobs) {
        cells.insert(cells.end(), job.cells.begin(), job.cells.end());
        origin.insert(origin.end(), job.cells.size(), -job.pos);
    }
    ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, std::move(cells));
    ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, std::move(origin));
    return flush.build_group(graph, pr.kd, pr.ig, stream, inp_cells, inp_origin);
}

float xkv_online_bases::measure(uint32_t stream, const problem & pr, const xkv_halves & tokens,
                                const std::vector<xkv_store::group> & groups, int n_thread) const {
    const uint32_t dim  = groups[pr.ig].dim[pr.kd];
    const uint32_t rank = std::min({ groups[pr.ig].rank[pr.kd], store.groups()[pr.ig].rank[pr.kd], dim });

    auto weight = kept(groups, pr);
    weight.resize(rank);

    const auto   rows    = rows_of(stream, pr, rank, n_thread);
    const size_t n_chunk = XKV_ONLINE_MEASURE / ((size_t) store.n_chunk * dim);

    double total = 0.0;
    double keep  = 0.0;
    each_exact(stream, pr, tokens, n_chunk, n_thread, [&](const xkv_floats & z, uint32_t n) {
        const auto coef = xkv_mul_rows(z, rows, n, rank, dim, n_thread);
        for (float v : z) {
            total += v * v;
        }
        for (uint32_t i = 0; i < n; ++i) {
            for (uint32_t r = 0; r < rank; ++r) {
                const float c = coef[(size_t) i * rank + r];
                keep += c * c * weight[r];
            }
        }
    });
    return total > 0.0 ? std::max(0.0, 1.0 - keep / total) : 0.0;
}

xkv_halves xkv_online_bases::read_tokens(llama_context * lctx, uint32_t stream, const std::vector<xkv_flush::job> & jobs,
                                         const problem & pr) {
    const uint32_t dim     = store.groups()[pr.ig].dim[pr.kd];
    const size_t   n_block = std::max<size_t>(1, XKV_ONLINE_READ / ((size_t) store.n_chunk * dim));

    xkv_halves res;
    res.reserve((size_t) xkv_job_cells(jobs).size() * dim);
    for (size_t i = 0; i < jobs.size(); i += n_block) {
        const std::vector<xkv_flush::job> part(jobs.begin() + i, jobs.begin() + std::min(jobs.size(), i + n_block));

        graph.begin(lctx, 64 + XKV_ONLINE_NODES_PER_LAYER * store.groups()[pr.ig].layers.size());
        ggml_tensor * x = input_tokens(stream, part, pr); // [dim, n_token]
        graph.output(x);
        graph.run();
        const auto data = graph.read(x);
        res.resize(res.size() + data.size());
        ggml_fp32_to_fp16_row(data.data(), res.data() + res.size() - data.size(), data.size());
    }
    return res;
}

void xkv_online_bases::each_block(const xkv_halves & tokens, uint32_t dim, const use_t & use) {
    const size_t n_token = tokens.size() / dim;
    for (size_t first = 0; first < n_token; first += XKV_ONLINE_BLOCK) {
        const size_t n = std::min<size_t>(XKV_ONLINE_BLOCK, n_token - first);
        xkv_floats   x(n * dim);
        ggml_fp16_to_fp32_row(tokens.data() + first * dim, x.data(), x.size());
        use(x, n);
    }
}

void xkv_online_bases::each_exact(uint32_t stream, const problem & pr, const xkv_halves & tokens, size_t n_chunk, int n_thread,
                                  const use_t & use) const {
    const uint32_t dim = store.groups()[pr.ig].dim[pr.kd];

    each_block(tokens, dim, use);

    auto         chunks = store.plain() ? tables[stream].used() : std::vector<uint32_t>();
    const size_t n_used = chunks.size();
    for (size_t i = 0; i < std::min(n_chunk, n_used); ++i) {
        chunks[i] = chunks[i * n_used / std::min(n_chunk, n_used)];
    }
    chunks.resize(std::min(n_chunk, n_used));
    const size_t n_block = std::max<size_t>(1, XKV_ONLINE_BLOCK / store.n_chunk);
    for (size_t i = 0; i < chunks.size(); i += n_block) {
        const auto coef = stored_coef(stream, pr, chunks, i, std::min(n_block, chunks.size() - i), n_thread);
        use(coef, coef.size() / dim);
    }
}

std::vector<xkv_online_bases::problem> xkv_online_bases::renew(llama_context * lctx, uint32_t stream,
                                                               const std::vector<xkv_flush::job> & jobs, const std::vector<problem> & list,
                                                               const xkv_store::layout * next, xkv_recodes * turns) {
    // as many at a time as there are threads for eigenproblems and memory for spaces
    const size_t n_thread = std::max(1, lctx->get_cparams().n_threads_batch);

    size_t n_bytes = 0;
    for (const auto & pr : list) {
        n_bytes = std::max(n_bytes, space_bytes(pr, rank_of(pr, next), xkv_job_cells(jobs).size()));
    }
    const size_t n_most = std::max<size_t>(1, std::min(n_thread, XKV_ONLINE_BYTES / n_bytes));

    std::vector<problem> applied;
    for (size_t first = 0; first < list.size(); first += n_most) {
        std::vector<problem> due;
        std::vector<space>   spaces;
        for (size_t i = first; i < std::min(list.size(), first + n_most); ++i) {
            auto tokens = read_tokens(lctx, stream, jobs, list[i]);
            if (is_due(stream, list[i], tokens, next, n_thread)) {
                due.push_back(list[i]);
                spaces.emplace_back();
                spaces.back().tokens = std::move(tokens);
            }
        }
        graph.release();
        if (due.empty()) {
            continue;
        }
        store.own_bases(stream);

        const size_t n = due.size();
        problem_peak   = std::max(problem_peak, n * n_bytes + (turns ? xkv_n_byte(*turns) : 0));

        std::vector<char> solved(n);
        xkv_parallel(n, n_thread, [&](size_t i) {
            spaces[i].n_thread = n_thread / n;
            build_rows(stream, due[i], rank_of(due[i], next), spaces[i]);
            solved[i] = orthonormalize(due[i], spaces[i]);
            if (solved[i]) {
                build_cov(stream, due[i], spaces[i]);
                solved[i] = solve(spaces[i]);
            }
        });
        xkv_trim(); // of what reading coefficients left, before the new basis and coefficients are made
        for (size_t i = 0; i < n; ++i) {
            const auto & pr = due[i];
            if (!solved[i]) {
                LLAMA_LOG_WARN("%s: %c of group %u keeps its basis: its eigenproblem has no solution\n", __func__,
                               pr.kd == kind::K ? 'K' : 'V', pr.ig);
            }
            spaces[i].cov      = xkv_floats();
            spaces[i].n_thread = n_thread;
            if (solved[i] && (!next || pays(stream, pr, spaces[i], *next))) {
                auto turn = apply(stream, pr, spaces[i], next);
                applied.push_back(pr);
                states[stream].n_update[pr.kd][pr.ig] = states[stream].n_past;
                if (next) {
                    (*turns)[pr.kd] = std::move(turn);
                } else if (!turn.rows.empty()) {
                    xkv_carry_over(store, pr.kd, pr.ig, stream, tables[stream].used(), turn, n_thread);
                }
            }
            spaces[i] = {};
        }
    }
    states[stream].info.n_update += !applied.empty();
    return applied;
}
