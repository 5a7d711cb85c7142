#include "cache/xkv-capture.h"

#include "base/xkv-error.h"
#include "base/xkv-frame.h"
#include "cache/xkv-support.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <typeinfo>

// tokens per graph
static const size_t XKV_CAPTURE_BLOCK = 1024;

// the cache of layers that keep all tokens, nullptr when it is none of llama.cpp's plain ones
static llama_kv_cache * xkv_plain_cache(llama_memory_i * mem) {
    if (const auto * both = dynamic_cast<llama_memory_hybrid_iswa *>(mem)) {
        mem = both->get_mem_attn();
    }
    if (const auto * hybrid = dynamic_cast<llama_memory_hybrid *>(mem)) {
        mem = hybrid->get_mem_attn();
    }
    if (const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(mem)) {
        mem = iswa->get_base();
    }
    return mem && typeid(*mem) == typeid(llama_kv_cache) ? static_cast<llama_kv_cache *>(mem) : nullptr;
}

xkv_capture::xkv_capture(llama_context * ctx, std::vector<std::vector<uint32_t>> layers_, uint32_t frame, uint32_t n_sink) :
    ctx(ctx), frame(frame), n_sink(n_sink), layers(std::move(layers_)) {
    const auto & model   = ctx->get_model();
    const auto & hparams = model.hparams;

    const std::string reason = xkv_unsupported_reason(model);
    if (!reason.empty()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", reason.c_str());
    }

    cache            = xkv_plain_cache(ctx->get_memory());
    const auto known = xkv_layers_of(model).held;
    // without V of its own there is no type to ask for
    const auto type_v = [&] { return xkv_v_in_k(hparams, known[0]) ? cache->type_k() : cache->type_v(); };
    if (!cache || (cache->type_k() != GGML_TYPE_F16 && cache->type_k() != GGML_TYPE_F32) || type_v() != cache->type_k()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "calibration needs a context with a plain f16 or f32 cache");
    }
    if (frame == 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "frame is 0 tokens, expected at least 1");
    }

    for (size_t g = 0; g < layers.size(); ++g) {
        if (layers[g].empty()) {
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "group %zu has no layers, expected at least one", g);
        }
        uint32_t dim[2] = { 0, 0 };
        for (uint32_t il : layers[g]) {
            if (!std::binary_search(known.begin(), known.end(), il)) {
                xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "group %zu has layer %u, expected one of the %zu that keep K and V", g, il,
                          known.size());
            }
            dim[0] += hparams.n_embd_k_gqa(il);
            dim[1] += xkv_n_embd_v(hparams, il);
        }
        for (int kd = 0; kd < 2; ++kd) {
            groups[kd].push_back(
                { dim[kd], std::vector<float>((size_t) dim[kd] * (dim[kd] + 1) / 2, 0.0f), std::vector<double>(dim[kd], 0.0) });
        }
    }
}

void xkv_capture::add(llama_seq_id seq_id) {
    if (seq_id < 0 || (uint32_t) seq_id >= cache->get_n_seq_max()) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "seq_id is %d, expected 0 to %u", seq_id, cache->get_n_seq_max() - 1);
    }
    llama_synchronize(ctx);

    std::vector<int64_t> cells;
    std::vector<int64_t> origin;
    for (const auto & [pos, idx] : cache->get_cells(seq_id).seq_pos_get(seq_id)) {
        if (pos < (llama_pos) n_sink) {
            continue;
        }
        cells.push_back(idx);
        origin.push_back(-(pos - (pos - (llama_pos) n_sink) % (llama_pos) frame));
        if (cells.size() == XKV_CAPTURE_BLOCK) {
            add_block(cache->get_stream(seq_id), cells, origin);
            cells.clear();
            origin.clear();
        }
    }
    if (!cells.empty()) {
        add_block(cache->get_stream(seq_id), cells, origin);
    }
    graph.release(); // the context may go before the sums are read
}

static llama_kv_cache::slot_info xkv_stream_info(uint32_t stream) {
    llama_kv_cache::slot_info sinfo = {};
    sinfo.s0                        = stream;
    sinfo.s1                        = stream;
    return sinfo;
}

ggml_tensor * xkv_capture::rows(uint32_t il, int kind, uint32_t stream) {
    ggml_context * gctx  = graph.ctx();
    const auto     sinfo = xkv_stream_info(stream);
    ggml_tensor *  t     = kind == 0 ? cache->get_k(gctx, il, cache->get_size(), sinfo) : cache->get_v(gctx, il, cache->get_size(), sinfo);
    if (t->nb[1] > t->nb[2]) {
        return nullptr; // stored transposed
    }
    return ggml_view_2d(gctx, t, t->ne[0] * t->ne[1], t->ne[2], t->nb[2], 0);
}

ggml_tensor * xkv_capture::layer_k(uint32_t il, uint32_t stream, ggml_tensor * cells, ggml_tensor * origin) {
    ggml_context * gctx = graph.ctx();

    ggml_tensor * k = cache->get_k(gctx, il, cache->get_size(), xkv_stream_info(stream)); // [n_embd_head, n_head_kv, size]

    const int64_t n_embd_head = k->ne[0];
    const int64_t n_head_kv   = k->ne[1];

    k = ggml_view_2d(gctx, k, n_embd_head * n_head_kv, k->ne[2], k->nb[2], 0);
    k = ggml_get_rows(gctx, k, cells);
    k = ggml_reshape_3d(gctx, k, n_embd_head, n_head_kv, cells->ne[0]);
    k = xkv_rotate(gctx, ctx->get_model(), ctx->get_cparams(), il, k, origin);
    return ggml_reshape_2d(gctx, k, n_embd_head * n_head_kv, cells->ne[0]);
}

ggml_tensor * xkv_capture::layer_v(uint32_t il, uint32_t stream, ggml_tensor * cells) {
    ggml_context * gctx = graph.ctx();

    ggml_tensor * v = cache->get_v(gctx, il, cache->get_size(), xkv_stream_info(stream));
    if (v->nb[1] > v->nb[2]) {
        v = ggml_cont(gctx, ggml_permute(gctx, v, 2, 1, 0, 3)); // stored transposed
    }
    v = ggml_view_2d(gctx, v, v->ne[0] * v->ne[1], v->ne[2], v->nb[2], 0);
    return ggml_get_rows(gctx, v, cells);
}

void xkv_capture::add_block(uint32_t stream, const std::vector<int64_t> & cells, const std::vector<int64_t> & origin) {
    struct result {
        sums *        to;
        ggml_tensor * gram;
        ggml_tensor * sum;
    };

    // one group at a time bounds the scratch
    for (size_t g = 0; g < layers.size(); ++g) {
        graph.begin(ctx, 64 + 32 * layers[g].size());

        ggml_context * gctx       = graph.ctx();
        ggml_tensor *  inp_cells  = graph.input(GGML_TYPE_I32, cells);
        ggml_tensor *  inp_origin = graph.input(GGML_TYPE_I32, origin);

        std::vector<result> results;
        for (int kd = 0; kd < 2; ++kd) {
            if (groups[kd][g].dim == 0) {
                continue;
            }
            ggml_tensor * x = nullptr; // [dim, n_token]
            for (uint32_t il : layers[g]) {
                ggml_tensor * cur = kd == 0 ? layer_k(il, stream, inp_cells, inp_origin) : layer_v(il, stream, inp_cells);
                x                 = x ? ggml_concat(gctx, x, cur, 0) : cur;
            }
            x = ggml_cont(gctx, ggml_transpose(gctx, x));

            results.push_back({ &groups[kd][g], ggml_mul_mat(gctx, x, x), ggml_sum_rows(gctx, x) });
            for (ggml_tensor * t : { results.back().gram, results.back().sum }) {
                ggml_set_output(t);
                graph.expand(t);
            }
        }

        graph.run();

        std::vector<float> data;
        for (const auto & r : results) {
            const uint32_t dim = r.to->dim;
            data.resize((size_t) dim * dim);
            ggml_backend_tensor_get(r.gram, data.data(), 0, ggml_nbytes(r.gram));
            float * to = r.to->gram.data();
            for (uint32_t i = 0; i < dim; to += ++i) {
                const float * row = data.data() + (size_t) i * dim;
                std::transform(row, row + i + 1, to, to, std::plus<float>());
            }

            data.resize(dim);
            ggml_backend_tensor_get(r.sum, data.data(), 0, ggml_nbytes(r.sum));
            std::transform(data.begin(), data.end(), r.to->sum.begin(), r.to->sum.begin(), [](float a, double b) { return a + b; });
        }
    }
    n_tokens += cells.size();
}

void xkv_capture::check(uint32_t group, int kind) const {
    if (group >= layers.size() || kind < 0 || kind > 1) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "group %u and kind %d, expected a group below %zu and kind 0 or 1", group, kind,
                  layers.size());
    }
    if (groups[kind][group].dim == 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "V of group %u is a part of K and not kept by itself; take K", group);
    }
}

void xkv_capture::read(uint32_t group, int kind, double * gram, double * sum, uint64_t * n) const {
    check(group, kind);
    const auto & from = groups[kind][group];
    const size_t dim  = from.dim;
    if (from.gram.empty()) {
        std::fill_n(gram, dim * dim, 0.0);
        std::fill_n(sum, dim, 0.0);
        *n = 0;
        return;
    }
    const float * row = from.gram.data();
    for (size_t i = 0; i < dim; row += ++i) {
        for (size_t j = 0; j <= i; ++j) {
            gram[i * dim + j] = gram[j * dim + i] = row[j];
        }
    }
    std::copy(from.sum.begin(), from.sum.end(), sum);
    *n = n_tokens;
}

void xkv_capture::drop(uint32_t group, int kind) {
    check(group, kind);
    std::vector<float>().swap(groups[kind][group].gram);
}

std::pair<std::vector<int64_t>, std::vector<int64_t>> xkv_capture::find(llama_seq_id seq_id, llama_pos pos, uint32_t n) const {
    if (seq_id < 0 || (uint32_t) seq_id >= cache->get_n_seq_max() || pos < (llama_pos) n_sink || n == 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "sequence %d and %u tokens from %d, expected a sequence below %u and tokens from %u on",
                  seq_id, n, pos, cache->get_n_seq_max(), n_sink);
    }
    llama_synchronize(ctx);

    std::pair<std::vector<int64_t>, std::vector<int64_t>> res;
    for (const auto & [p, idx] : cache->get_cells(seq_id).seq_pos_get(seq_id)) {
        if (p >= pos && p - pos < (llama_pos) n) {
            res.first.push_back(idx);
            res.second.push_back(p - (p - (llama_pos) n_sink) % (llama_pos) frame);
        }
    }
    if (res.first.size() != n) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "sequence %d holds %zu tokens from %d on, expected %u", seq_id, res.first.size(), pos, n);
    }
    return res;
}

void xkv_capture::get(llama_seq_id seq_id, uint32_t group, int kind, llama_pos pos, uint32_t n, float * x) {
    check(group, kind);
    auto [cells, origin] = find(seq_id, pos, n);
    for (auto & p : origin) {
        p = -p;
    }
    const uint32_t stream = cache->get_stream(seq_id);

    graph.begin(ctx, 64 + 32 * layers[group].size());
    ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, std::move(cells));
    ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, std::move(origin));

    std::vector<ggml_tensor *> parts;
    for (uint32_t il : layers[group]) {
        parts.push_back(kind == 0 ? layer_k(il, stream, inp_cells, inp_origin) : layer_v(il, stream, inp_cells));
        graph.output(parts.back());
    }
    graph.run();

    const size_t dim = groups[kind][group].dim;
    size_t       at  = 0;
    for (const auto * t : parts) {
        const auto data = xkv_graph::read(t);
        for (uint32_t i = 0; i < n; ++i) {
            std::copy_n(data.data() + i * t->ne[0], t->ne[0], x + i * dim + at);
        }
        at += t->ne[0];
    }
    graph.release();
}

void xkv_capture::put(llama_seq_id seq_id, uint32_t group, int kind, llama_pos pos, uint32_t n, const float * x) {
    check(group, kind);
    auto [cells, origin]  = find(seq_id, pos, n);
    const uint32_t stream = cache->get_stream(seq_id);
    const size_t   dim    = groups[kind][group].dim;

    graph.begin(ctx, 64 + 32 * layers[group].size());
    ggml_context * gctx       = graph.ctx();
    ggml_tensor *  inp_cells  = graph.input(GGML_TYPE_I64, std::move(cells));
    ggml_tensor *  inp_origin = graph.input(GGML_TYPE_I32, std::move(origin));

    size_t at = 0;
    for (uint32_t il : layers[group]) {
        const auto &  hparams = ctx->get_model().hparams;
        const size_t  n_embd  = kind == 0 ? hparams.n_embd_k_gqa(il) : hparams.n_embd_v_gqa(il);
        ggml_tensor * to      = rows(il, kind, stream);
        if (!to) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "V of layer %u is stored transposed, expected a cache with flash attention", il);
        }
        xkv_floats part(n_embd * n);
        for (uint32_t i = 0; i < n; ++i) {
            std::copy_n(x + i * dim + at, n_embd, part.data() + i * n_embd);
        }
        at += n_embd;

        ggml_tensor * cur = graph.input(n_embd, n, std::move(part));
        if (kind == 0) {
            const int64_t n_head_kv = hparams.n_head_kv(il);
            cur                     = ggml_reshape_3d(gctx, cur, n_embd / n_head_kv, n_head_kv, n);
            cur                     = xkv_rotate(gctx, ctx->get_model(), ctx->get_cparams(), il, cur, inp_origin);
            cur                     = ggml_reshape_2d(gctx, cur, n_embd, n);
        }
        graph.expand(ggml_set_rows(gctx, to, cur, inp_cells));
    }
    graph.run();
    graph.release();
}
