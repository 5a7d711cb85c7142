#include "store/xkv-carry.h"

#include "base/xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <algorithm>

// the first numbers of every row [n, n_old] as [n, n_new], with zeros where there are none
static std::vector<float> xkv_cut_rows(const std::vector<float> & rows, size_t n, size_t n_old, size_t n_new) {
    std::vector<float> res(n*n_new, 0.0f);
    for (size_t i = 0; i < n; ++i) {
        std::copy_n(rows.begin() + i*n_old, std::min(n_old, n_new), res.begin() + i*n_new);
    }
    return res;
}

void xkv_carry_over(xkv_graph & graph, llama_context * lctx, const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream,
                    const std::vector<uint32_t> & chunks, const std::vector<float> & turn, const xkv_store::layout * next) {
    const uint32_t n_chunk  = store.n_chunk;
    const uint32_t rank_old = store.groups()[ig].rank[kd];
    const uint32_t rank     = (next ? next->groups : store.groups())[ig].rank[kd];
    const size_t   n_block  = XKV_CARRY_BLOCK/n_chunk;
    const int      n_thread = lctx->get_cparams().n_threads_batch;

    for (size_t i = 0; i < chunks.size(); i += n_block) {
        const size_t n_now = std::min(n_block, chunks.size() - i);

        std::vector<float> coef(n_now*n_chunk*rank_old);
        xkv_parallel(n_now, n_thread, [&](size_t j) {
            const auto part = store.get_coef(kd, ig, stream, chunks[i + j]);
            std::copy(part.begin(), part.end(), coef.begin() + j*part.size());
        });
        if (turn.empty()) {
            coef = xkv_cut_rows(coef, n_now*n_chunk, rank_old, rank);
        } else {
            graph.begin(lctx, 64);
            ggml_tensor * a = graph.input(rank_old, n_now*n_chunk, std::move(coef));
            ggml_tensor * b = ggml_mul_mat(graph.ctx(), graph.input(rank_old, rank, turn), a);
            graph.output(b);
            graph.run();
            coef = graph.read(b);
        }
        xkv_parallel(n_now, n_thread, [&](size_t j) {
            store.set_coef(kd, ig, stream, chunks[i + j], coef.data() + j*n_chunk*rank, next);
        });
    }
}
