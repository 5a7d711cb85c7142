#include "flow/xkv-flush.h"

#include "base/xkv-frame.h"
#include "base/xkv-parallel.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>
#include <functional>
#include <numeric>

// tokens that are compressed in one graph: bounds its scratch
static const uint32_t XKV_FLUSH_BLOCK = 512;

static size_t xkv_n_node(const xkv_store::group & gr) {
    return 64 + gr.layers.size() * (32 + 16);
}

ggml_tensor * xkv_flush::build_layer(ggml_context * ctx, xkv_store::kind kd, uint32_t il, uint32_t stream, ggml_tensor * cells,
                                     ggml_tensor * origin) const {
    const auto & hparams = setup.model.hparams;

    if (kd == xkv_store::kind::V) {
        return ggml_get_rows(ctx, window.v(il, stream), cells); // the window holds centred V
    }
    ggml_tensor * mean = store.layer_of(il).mean_k;
    ggml_tensor * k    = ggml_get_rows(ctx, window.k(il, stream), cells);
    k                  = ggml_reshape_3d(ctx, k, hparams.n_embd_head_k(il), hparams.n_head_kv(il), cells->ne[0]);
    k                  = xkv_rotate(ctx, setup.model, setup.cparams, il, k, origin);
    k                  = ggml_reshape_2d(ctx, k, mean->ne[0], cells->ne[0]);
    return ggml_sub(ctx, k, mean);
}

ggml_tensor * xkv_flush::build_group(xkv_graph & graph, xkv_store::kind kd, uint32_t ig, uint32_t stream, ggml_tensor * cells,
                                     ggml_tensor * origin) const {
    const auto & gr = store.groups()[ig];

    ggml_tensor * res = nullptr;
    for (uint32_t il : gr.layers) {
        ggml_tensor * x = build_layer(graph.ctx(), kd, il, stream, cells, origin);
        res             = res ? ggml_concat(graph.ctx(), res, x, 0) : x;
    }
    return res;
}

std::vector<float> xkv_flush::value_drain(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & cells) {
    graph.begin(lctx, 64 + 10 * store.layers().size());

    ggml_context * ctx       = graph.ctx();
    ggml_tensor *  inp_cells = graph.input(GGML_TYPE_I32, std::vector<int64_t>(cells.begin(), cells.end()));

    std::vector<ggml_tensor *> energy; // per layer [1, n]
    for (const auto & l : store.layers()) {
        ggml_tensor * v = nullptr;
        if (l.v_in_k) {
            const auto & hparams = setup.model.hparams;
            v                    = ggml_get_rows(ctx, window.k(l.il, stream), inp_cells);
            v                    = ggml_view_4d(ctx, v, hparams.n_embd_head_v(l.il), hparams.n_head_kv(l.il), v->ne[1], 1,
                                                hparams.n_embd_head_k(l.il) * v->nb[0], v->nb[1], v->nb[2], 0);
            v                    = ggml_cont_2d(ctx, v, v->ne[0] * v->ne[1], v->ne[2]);
        } else {
            v = ggml_add(ctx, ggml_get_rows(ctx, window.v(l.il, stream), inp_cells), l.mean_v);
        }
        energy.push_back(ggml_sum_rows(ctx, ggml_sqr(ctx, v)));
        graph.output(energy.back());
    }
    graph.run();

    std::vector<float> res(cells.size(), 1.0f);
    for (const auto * t : energy) {
        const auto  e    = graph.read(t);
        const float mean = std::accumulate(e.begin(), e.end(), 0.0f) / e.size();
        for (size_t i = 0; mean > 0.0f && i < e.size(); ++i) {
            res[i] = std::min(res[i], e[i] / mean);
        }
    }
    return res;
}

void xkv_flush::compress(llama_context * lctx, uint32_t stream, const std::vector<job> & jobs) {
    const size_t n_block = std::max<size_t>(1, XKV_FLUSH_BLOCK / store.n_chunk);
    for (size_t i = 0; i < jobs.size(); i += n_block) {
        compress_block(lctx, stream, jobs.data() + i, std::min(n_block, jobs.size() - i));
    }
    graph.release();
}

void xkv_flush::compress_block(llama_context * lctx, uint32_t stream, const job * jobs, size_t n_job) {
    const uint32_t n_chunk = store.n_chunk;

    std::vector<int64_t> cells;
    std::vector<int64_t> origin;
    for (size_t j = 0; j < n_job; ++j) {
        for (uint32_t i = 0; i < n_chunk; ++i) {
            // slots beyond the last token of a chunk repeat it: their values are finite and masked
            cells.push_back(jobs[j].cells[std::min<size_t>(i, jobs[j].cells.size() - 1)]);
            origin.push_back(-jobs[j].pos);
        }
    }

    for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
        for (auto kd : store.kinds(ig)) {
            const auto data =
                store.plain() ? read_group(lctx, kd, ig, stream, cells, origin) : project_group(lctx, kd, ig, stream, cells, origin);
            xkv_parallel(n_job, lctx->get_cparams().n_threads_batch, [&](size_t j) {
                store.set_coef(kd, ig, stream, jobs[j].ic, data.data() + j * n_chunk * store.groups()[ig].rank[kd]);
            });
        }
    }
}

xkv_floats xkv_flush::read_group(llama_context * lctx, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<int64_t> & cells,
                                 const std::vector<int64_t> & origin) {
    graph.begin(lctx, xkv_n_node(store.groups()[ig]));
    ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, cells);
    ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, origin);
    ggml_tensor * x          = build_group(graph, kd, ig, stream, inp_cells, inp_origin);
    graph.output(x);
    graph.run();
    return graph.read(x);
}

xkv_floats xkv_flush::project_group(llama_context * lctx, xkv_store::kind kd, uint32_t ig, uint32_t stream,
                                    const std::vector<int64_t> & cells, const std::vector<int64_t> & origin) {
    const auto & gr = store.groups()[ig];

    // a layer at a time, whose basis is the largest thing here
    xkv_floats res(cells.size() * gr.rank[kd], 0.0f);
    for (uint32_t il : gr.layers) {
        graph.begin(lctx, xkv_n_node(gr));
        ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, cells);
        ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, origin);
        ggml_tensor * x          = build_layer(graph.ctx(), kd, il, stream, inp_cells, inp_origin);
        ggml_tensor * basis =
            graph.input(x->ne[0], gr.rank[kd], store.get_basis_layer(kd, il, stream, lctx->get_cparams().n_threads_batch));
        ggml_tensor * part = ggml_mul_mat(graph.ctx(), basis, x);
        graph.output(part);
        graph.run();

        const auto add = graph.read(part);
        std::transform(add.begin(), add.end(), res.begin(), res.begin(), std::plus<float>());
    }
    return res;
}

void xkv_flush::restore(llama_context * lctx, uint32_t stream, uint32_t ic, llama_pos pos, const std::vector<uint32_t> & slots,
                        const std::vector<uint32_t> & cells) {
    const auto & hparams = setup.model.hparams;

    const uint32_t n = slots.size();

    for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
        const auto & gr = store.groups()[ig];

        graph.begin(lctx, xkv_n_node(gr));

        ggml_context * ctx        = graph.ctx();
        ggml_tensor *  inp_slots  = graph.input(GGML_TYPE_I32, std::vector<int64_t>(slots.begin(), slots.end()));
        ggml_tensor *  inp_origin = graph.input(GGML_TYPE_I32, std::vector<int64_t>(n, pos));
        ggml_tensor *  inp_cells  = graph.input(GGML_TYPE_I64, std::vector<int64_t>(cells.begin(), cells.end()));

        for (auto kd : store.kinds(ig)) {
            ggml_tensor * coef = graph.input(gr.rank[kd], store.n_chunk, store.get_coef(kd, ig, stream, ic));
            coef               = ggml_get_rows(ctx, coef, inp_slots); // [rank, n]

            for (uint32_t il : gr.layers) {
                ggml_tensor * x = nullptr; // [n_embd, n]
                if (store.plain()) {
                    const auto & seg = store.plain_segment(kd, il);
                    x                = ggml_view_2d(ctx, coef, seg.rank, n, coef->nb[1], seg.first * coef->nb[0]);
                } else {
                    const auto    rows  = store.get_basis_layer(kd, il, stream, lctx->get_cparams().n_threads_batch);
                    ggml_tensor * basis = graph.input(rows.size() / gr.rank[kd], gr.rank[kd], rows);
                    x                   = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, basis)), coef);
                }
                if (kd == xkv_store::kind::K) {
                    x = ggml_add(ctx, x, store.layer_of(il).mean_k);
                    x = ggml_reshape_3d(ctx, x, hparams.n_embd_head_k(il), hparams.n_head_kv(il), n);
                    x = xkv_rotate(ctx, setup.model, setup.cparams, il, x, inp_origin);
                    x = ggml_reshape_2d(ctx, x, store.layer_of(il).mean_k->ne[0], n);
                }
                ggml_tensor * dst = kd == xkv_store::kind::K ? window.k(il, stream) : window.v(il, stream);
                graph.expand(ggml_set_rows(ctx, dst, x, inp_cells));
            }
        }
        graph.run();
    }
    graph.release();
}
