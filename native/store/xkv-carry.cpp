#include "store/xkv-carry.h"

#include "base/xkv-lapack.h"
#include "base/xkv-parallel.h"

#include <algorithm>

// the first numbers of every row [n, n_old] as [n, n_new], with zeros where there are none
static xkv_floats xkv_cut_rows(const xkv_floats & rows, size_t n, size_t n_old, size_t n_new) {
    xkv_floats res(n*n_new, 0.0f);
    for (size_t i = 0; i < n; ++i) {
        std::copy_n(rows.begin() + i*n_old, std::min(n_old, n_new), res.begin() + i*n_new);
    }
    return res;
}

void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_floats & turn, const xkv_store::layout * next, int n_thread) {
    const uint32_t rank_old = store.groups()[ig].rank[kd];
    const uint32_t rank     = (next ? next->groups : store.groups())[ig].rank[kd];

    xkv_parallel(chunks.size(), n_thread, [&](size_t i) {
        const auto old  = store.get_coef(kd, ig, stream, chunks[i]);
        const auto coef = turn.empty() ? xkv_cut_rows(old, store.n_chunk, rank_old, rank) : xkv_mul_rows(old, turn, store.n_chunk, rank, rank_old);
        store.set_coef(kd, ig, stream, chunks[i], coef.data(), next);
    });
}
