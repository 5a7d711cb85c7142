#include "store/xkv-carry.h"

#include "base/xkv-lapack.h"
#include "base/xkv-parallel.h"

#include <algorithm>
#include <deque>
#include <numeric>
#include <utility>

// tokens that are multiplied at once: a product has to read all of a turn
static const uint32_t XKV_CARRY_BLOCK = 128;

xkv_recode xkv_recode_all(xkv_floats rows, uint32_t n_to, uint32_t n_from) {
    xkv_recode res = { std::move(rows), std::vector<uint32_t>(n_from), std::vector<uint32_t>(n_to) };
    std::iota(res.from.begin(), res.from.end(), 0);
    std::iota(res.to.begin(), res.to.end(), 0);
    return res;
}

xkv_recode xkv_keep_basis(xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, xkv_floats rows,
                          const xkv_store::layout & next, int n_thread) {
    store.set_basis(kd, ig, stream, rows, &next, n_thread);
    return store.plain() ? xkv_recode_all(std::move(rows), next.groups[ig].rank[kd], store.groups()[ig].dim[kd]) : xkv_recode();
}

size_t xkv_n_byte(const xkv_recodes & turns) {
    return (turns[0].rows.size() + turns[1].rows.size()) * sizeof(float);
}

// the new coefficients of n chunks [n*n_chunk, rank]
static xkv_floats xkv_turned(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const uint32_t * chunks, size_t n,
                             const xkv_recode & turn, uint32_t rank) {
    const size_t rank_old = store.groups()[ig].rank[kd];
    const size_t n_chunk  = store.n_chunk;
    const size_t n_from   = turn.from.size();
    const size_t n_to     = turn.to.size();

    xkv_floats coef(n * n_chunk * rank, 0.0f);
    xkv_floats from(n * n_chunk * n_from);
    for (size_t j = 0; j < n; ++j) {
        const auto old = store.get_coef(kd, ig, stream, chunks[j]);
        for (size_t i = 0; i < n_chunk; ++i) {
            const float * x = old.data() + i * rank_old;
            std::copy_n(x, std::min<size_t>(rank_old, rank), coef.begin() + (j * n_chunk + i) * rank);
            std::transform(turn.from.begin(), turn.from.end(), from.begin() + (j * n_chunk + i) * n_from, [x](uint32_t r) { return x[r]; });
        }
    }
    const auto to = xkv_mul_rows(from, turn.rows, n * n_chunk, n_to, n_from, 1);
    for (size_t i = 0; i < n * n_chunk; ++i) {
        for (size_t r = 0; r < n_to; ++r) {
            coef[i * rank + turn.to[r]] = to[i * n_to + r];
        }
    }
    return coef;
}

void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_recode & turn, int n_thread) {
    const size_t rank    = store.groups()[ig].rank[kd];
    const size_t n_block = std::max<size_t>(1, XKV_CARRY_BLOCK / store.n_chunk);

    xkv_parallel((chunks.size() + n_block - 1) / n_block, n_thread, [&](size_t ib) {
        const size_t first = ib * n_block;
        const size_t n     = std::min(n_block, chunks.size() - first);
        const auto   coef  = xkv_turned(store, kd, ig, stream, chunks.data() + first, n, turn, rank);
        for (size_t j = 0; j < n; ++j) {
            store.set_coef(kd, ig, stream, chunks[first + j], coef.data() + j * store.n_chunk * rank);
        }
    });
}

size_t xkv_carry_stage(const xkv_store & store, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                       const xkv_recodes & turns, const xkv_store::layout & next, int n_thread) {
    const auto & gr      = next.groups[ig];
    const size_t n_block = std::max<size_t>(1, XKV_CARRY_BLOCK / store.n_chunk);
    const size_t n_round = n_block * std::max(1, n_thread); // chunks that are read before some are written

    std::deque<std::pair<uint32_t, std::vector<uint8_t>>> waiting;

    size_t peak = 0;
    for (size_t first = 0; first < chunks.size(); first += n_round) {
        const size_t n = std::min(n_round, chunks.size() - first);

        std::vector<std::vector<uint8_t>> made(n);
        xkv_parallel((n + n_block - 1) / n_block, n_thread, [&](size_t ib) {
            const size_t at     = ib * n_block;
            const size_t n_part = std::min(n_block, n - at);
            for (size_t j = 0; gr.pack && j < n_part; ++j) {
                made[at + j].resize(gr.packed->ne[0]);
            }
            for (auto kd : store.kinds(ig)) {
                const auto coef = xkv_turned(store, kd, ig, stream, chunks.data() + first + at, n_part, turns[kd], gr.rank[kd]);
                for (size_t j = 0; j < n_part; ++j) {
                    const float * x = coef.data() + j * store.n_chunk * gr.rank[kd];
                    if (gr.pack) {
                        store.pack_coef(gr, kd, x, made[at + j].data());
                    } else {
                        store.set_coef(gr, kd, stream, chunks[first + at + j], x);
                    }
                }
            }
        });
        if (!gr.pack) {
            continue;
        }
        for (size_t j = 0; j < n; ++j) {
            waiting.emplace_back(chunks[first + j], std::move(made[j]));
        }
        peak = std::max(peak, waiting.size() * waiting.front().second.size());

        const size_t n_free = first + n < chunks.size() ? store.n_free(next, ig, chunks[first + n]) : gr.packed->ne[1];
        for (; !waiting.empty() && waiting.front().first < n_free; waiting.pop_front()) {
            store.set_packed(gr, stream, waiting.front().first, waiting.front().second);
        }
    }
    return peak + xkv_n_byte(turns);
}

void xkv_carry_into(const xkv_store & from, const xkv_store & to, xkv_store::kind kd, uint32_t ig, uint32_t stream,
                    const std::vector<uint32_t> & chunks, const xkv_recode & turn, int n_thread) {
    const size_t rank    = to.groups()[ig].rank[kd];
    const size_t n_block = std::max<size_t>(1, XKV_CARRY_BLOCK / to.n_chunk);

    std::vector<uint32_t> list(chunks.size());
    std::iota(list.begin(), list.end(), 0);
    xkv_parallel((chunks.size() + n_block - 1) / n_block, n_thread, [&](size_t ib) {
        const size_t first = ib * n_block;
        const size_t n     = std::min(n_block, chunks.size() - first);
        const auto   coef  = xkv_turned(from, kd, ig, 0, list.data() + first, n, turn, rank);
        for (size_t j = 0; j < n; ++j) {
            to.set_coef(kd, ig, stream, chunks[first + j], coef.data() + j * to.n_chunk * rank);
        }
    });
}
