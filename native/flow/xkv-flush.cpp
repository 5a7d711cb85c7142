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
    if (kd == xkv_store::kind::V) {
        return ggml_get_rows(ctx, window.v(il, stream), cells); // the window holds centred V
    }
    ggml_tensor * mean = store.layer_of(il).mean_k;
    return ggml_sub(ctx, build_turn(ctx, il, ggml_get_rows(ctx, window.k(il, stream), cells), origin), mean);
}

ggml_tensor * xkv_flush::build_turn(ggml_context * ctx, uint32_t il, ggml_tensor * k, ggml_tensor * by) const {
    const auto &  hparams = setup.model.hparams;
    const int64_t n_embd  = k->ne[0];
    const int64_t n       = k->ne[1];

    k = ggml_reshape_3d(ctx, k, hparams.n_embd_head_k(il), hparams.n_head_kv(il), n);
    k = xkv_rotate(ctx, setup.model, setup.cparams, il, k, by);
    return ggml_reshape_2d(ctx, k, n_embd, n);
}

ggml_tensor * xkv_flush::build_decoded(llama_context * lctx, xkv_store::kind kd, uint32_t il, uint32_t stream, ggml_tensor * coef) {
    ggml_context * ctx = graph.ctx();
    if (store.plain()) {
        const auto & seg = store.plain_segment(kd, il);
        return ggml_view_2d(ctx, coef, seg.rank, coef->ne[1], coef->nb[1], seg.first * coef->nb[0]);
    }
    const auto    rows  = store.get_basis_layer(kd, il, stream, lctx->get_cparams().n_threads_batch);
    ggml_tensor * basis = graph.input(rows.size() / coef->ne[0], coef->ne[0], rows);
    return ggml_mul_mat(ctx, ggml_cont(ctx, ggml_transpose(ctx, basis)), coef);
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
                ggml_tensor * x = build_decoded(lctx, kd, il, stream, coef); // [n_embd, n]
                if (kd == xkv_store::kind::K) {
                    x = build_turn(ctx, il, ggml_add(ctx, x, store.layer_of(il).mean_k), inp_origin);
                }
                ggml_tensor * dst = kd == xkv_store::kind::K ? window.k(il, stream) : window.v(il, stream);
                graph.expand(ggml_set_rows(ctx, dst, x, inp_cells));
            }
        }
        graph.run();
    }
    graph.release();
}

void xkv_flush::turn(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & cells, const std::vector<llama_pos> & by) {
    for (const auto & gr : store.groups()) {
        graph.begin(lctx, xkv_n_node(gr));

        ggml_context * ctx      = graph.ctx();
        ggml_tensor *  inp_from = graph.input(GGML_TYPE_I32, std::vector<int64_t>(cells.begin(), cells.end()));
        ggml_tensor *  inp_to   = graph.input(GGML_TYPE_I64, std::vector<int64_t>(cells.begin(), cells.end()));
        ggml_tensor *  inp_by   = graph.input(GGML_TYPE_I32, std::vector<int64_t>(by.begin(), by.end()));

        for (uint32_t il : gr.layers) {
            ggml_tensor * k = window.k(il, stream);
            graph.expand(ggml_set_rows(ctx, k, build_turn(ctx, il, ggml_get_rows(ctx, k, inp_from), inp_by), inp_to));
        }
        graph.run();
    }
    graph.release();
}

xkv_floats xkv_flush::turned(llama_context * lctx, uint32_t ig, uint32_t stream, const xkv_floats & coef,
                             const std::vector<llama_pos> & by) {
    const auto     kd   = xkv_store::kind::K;
    const auto &   gr   = store.groups()[ig];
    const uint32_t rank = gr.rank[kd];

    // a layer at a time, whose basis is the largest thing here
    xkv_floats res(coef.size(), 0.0f);
    for (uint32_t il : gr.layers) {
        graph.begin(lctx, xkv_n_node(gr));

        ggml_context * ctx    = graph.ctx();
        ggml_tensor *  inp_by = graph.input(GGML_TYPE_I32, std::vector<int64_t>(by.begin(), by.end()));
        ggml_tensor *  mean   = store.layer_of(il).mean_k;
        ggml_tensor *  x      = build_decoded(lctx, kd, il, stream, graph.input(rank, by.size(), coef));

        x = ggml_sub(ctx, build_turn(ctx, il, ggml_add(ctx, x, mean), inp_by), mean); // [n_embd, n]
        if (!store.plain()) {
            const auto rows = store.get_basis_layer(kd, il, stream, lctx->get_cparams().n_threads_batch);
            x               = ggml_mul_mat(ctx, graph.input(x->ne[0], rank, rows), x);
        }
        graph.output(x);
        graph.run();

        const auto   part  = graph.read(x);
        const size_t first = store.plain() ? store.plain_segment(kd, il).first : 0;
        const size_t n_row = part.size() / by.size();
        for (size_t i = 0; i < by.size(); ++i) {
            float * row = res.data() + i * rank + first;
            std::transform(row, row + n_row, part.data() + i * n_row, row, std::plus<float>());
        }
    }
    return res;
}
