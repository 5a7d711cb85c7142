#include "store/xkv-carry.h"

#include "base/xkv-lapack.h"
#include "base/xkv-parallel.h"

#include <algorithm>
#include <numeric>

// tokens that are multiplied at once: a product has to read all of a turn
static const uint32_t XKV_CARRY_BLOCK = 128;

xkv_turn xkv_turn_all(xkv_floats rows, uint32_t n_to, uint32_t n_from) {
    xkv_turn res = { std::move(rows), std::vector<uint32_t>(n_from), std::vector<uint32_t>(n_to) };
    std::iota(res.from.begin(), res.from.end(), 0);
    std::iota(res.to  .begin(), res.to  .end(), 0);
    return res;
}

void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_turn & turn, const xkv_store::layout * next, int n_thread) {
    const size_t rank_old = store.groups()[ig].rank[kd];
    const size_t rank     = (next ? next->groups : store.groups())[ig].rank[kd];
    const size_t n_chunk  = store.n_chunk;
    const size_t n_from   = turn.from.size();
    const size_t n_to     = turn.to.size();
    const size_t n_block  = std::max<size_t>(1, XKV_CARRY_BLOCK/n_chunk);

    xkv_parallel((chunks.size() + n_block - 1)/n_block, n_thread, [&](size_t ib) {
        const size_t first = ib*n_block;
        const size_t n     = std::min(n_block, chunks.size() - first);

        xkv_floats coef(n*n_chunk*rank,   0.0f);
        xkv_floats from(n*n_chunk*n_from);
        for (size_t j = 0; j < n; ++j) {
            const auto old = store.get_coef(kd, ig, stream, chunks[first + j]);
            for (size_t i = 0; i < n_chunk; ++i) {
                const float * x = old.data() + i*rank_old;
                std::copy_n(x, std::min(rank_old, rank), coef.begin() + (j*n_chunk + i)*rank);
                std::transform(turn.from.begin(), turn.from.end(), from.begin() + (j*n_chunk + i)*n_from, [x](uint32_t r) { return x[r]; });
            }
        }
        const auto to = xkv_mul_rows(from, turn.rows, n*n_chunk, n_to, n_from, 1);
        for (size_t i = 0; i < n*n_chunk; ++i) {
            for (size_t r = 0; r < n_to; ++r) {
                coef[i*rank + turn.to[r]] = to[i*n_to + r];
            }
        }
        for (size_t j = 0; j < n; ++j) {
            store.set_coef(kd, ig, stream, chunks[first + j], coef.data() + j*n_chunk*rank, next);
        }
    });
}
