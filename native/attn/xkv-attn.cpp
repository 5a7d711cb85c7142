// Attention over store and window. Three paths that compute the same:
//   packed:       the op XKV_ATTN, where a layer's device has it
//   materialized: K and V of the stored tokens are rebuilt for one layer, then flash attention (many queries)
//   absorbed:     queries go to the chunks' frames and through the basis, and meet the coefficients (few queries)

#include "attn/xkv-attn.h"

#include "attn/xkv-attn-hooks.h"
#include "base/xkv-error.h"
#include "base/xkv-frame.h"
#include "format/xkv-sidecar.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <cmath>
#include <cstring>

//
// llm_graph_input_xkv
//

llm_graph_input_xkv::llm_graph_input_xkv(const xkv_view * view, bool absorb) :
    view(view), n_slot(view->n_slot), n_change(view->store->n_change()), absorb(absorb) {}

void llm_graph_input_xkv::set_input(const llama_ubatch * ubatch) {
    const uint32_t n_chunk  = view->store->n_chunk;
    const uint32_t n_stream = view->n_stream;

    *view->graph_memory = out ? out->buffer : nullptr;

    if (frame && frame->buffer) {
        std::vector<int32_t> data;
        for (uint32_t s = 0; s < n_stream; ++s) {
            const auto & chunks = view->table(s);
            for (uint32_t ic = 0; ic < n_slot / n_chunk; ++ic) {
                data.push_back(ic < chunks.size() && chunks[ic].n > 0 ? -chunks[ic].pos : 0);
            }
        }
        ggml_backend_tensor_set(frame, data.data(), 0, ggml_nbytes(frame));
    }

    if (fill && fill->buffer) {
        std::vector<int32_t> data(ggml_nelements(fill), 0);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const llama_seq_id seq_id = ubatch->seq_id[i][0];
            const auto &       chunks = view->table_of(seq_id);
            for (uint32_t ic = 0; ic < std::min<size_t>(n_slot / n_chunk, chunks.size()); ++ic) {
                data[(size_t) i * fill->ne[0] + ic] = chunks[ic].seqs.test(seq_id) ? chunks[ic].n : 0;
            }
        }
        ggml_backend_tensor_set(fill, data.data(), 0, ggml_nbytes(fill));
    }

    if (origin && origin->buffer) {
        std::vector<int32_t> data;
        data.reserve(origin->ne[0]);
        for (uint32_t s = 0; s < n_stream; ++s) {
            const auto & chunks = view->table(s);
            for (uint32_t ic = 0; ic < n_slot / n_chunk; ++ic) {
                const llama_pos pos = ic < chunks.size() && chunks[ic].n > 0 ? chunks[ic].pos : 0;
                data.insert(data.end(), absorb ? 1 : n_chunk, absorb ? -pos : pos);
            }
            data.resize((size_t) (s + 1) * origin->ne[0] / n_stream, 0);
        }
        ggml_backend_tensor_set(origin, data.data(), 0, ggml_nbytes(origin));
    }

    if (mask && mask->buffer) {
        const uint32_t n_tps = ubatch->n_tokens / n_stream;

        const ggml_fp16_t keep = ggml_fp32_to_fp16(0.0f);
        const ggml_fp16_t drop = ggml_fp32_to_fp16(-INFINITY);

        std::vector<ggml_fp16_t> data(ggml_nelements(mask), drop);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const llama_seq_id seq_id = ubatch->seq_id[i][0];

            ggml_fp16_t * row = data.data() + (size_t) i * n_slot;
            if (i % n_tps > 0 && ubatch->seq_id[i - 1][0] == seq_id) {
                memcpy(row, row - n_slot, n_slot * sizeof(*row)); // a stored token is older than every query of its sequence
                continue;
            }
            const auto & chunks = view->table_of(seq_id);
            for (uint32_t ic = 0; ic < std::min<size_t>(n_slot / n_chunk, chunks.size()); ++ic) {
                if (chunks[ic].seqs.test(seq_id)) {
                    std::fill_n(row + ic * n_chunk, chunks[ic].n, keep);
                }
            }
        }
        ggml_backend_tensor_set(mask, data.data(), 0, ggml_nbytes(mask));
    }
}

// the part of a memory's context that an xkv cache makes
static const xkv_view * xkv_view_of(const llama_memory_context_i * mctx) {
    if (const auto * both = dynamic_cast<const llama_memory_hybrid_iswa_context *>(mctx)) {
        return both->get_attn()->get_base()->as_xkv();
    }
    if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid_context *>(mctx)) {
        return hybrid->get_attn()->as_xkv();
    }
    if (const auto * iswa = dynamic_cast<const llama_kv_cache_iswa_context *>(mctx)) {
        return iswa->get_base()->as_xkv();
    }
    return static_cast<const llama_kv_cache_context *>(mctx)->as_xkv();
}

bool llm_graph_input_xkv::can_reuse(const llm_graph_params & params) {
    view = xkv_view_of(params.mctx);

    // the shape of the micro-batch is checked by the input of the window
    return view->n_slot == n_slot && view->store->n_change() == n_change;
}

//
// graph
//

static llm_graph_input_xkv * xkv_get_input(const llm_graph_context & gctx, const xkv_view * view) {
    for (auto & inp : gctx.res->inputs) {
        if (auto * res = dynamic_cast<llm_graph_input_xkv *>(inp.get())) {
            return res;
        }
    }

    const uint32_t n_stream = view->n_stream;
    const uint32_t n_tps    = gctx.n_tokens / n_stream;

    auto inp = std::make_unique<llm_graph_input_xkv>(view, n_tps <= view->setup->config.n_absorb && (n_stream == 1 || n_tps == 1));
    if (inp->n_slot > 0) {
        const uint32_t n_origin = inp->absorb ? inp->n_slot / view->store->n_chunk : inp->n_slot;

        inp->origin = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, (int64_t) n_origin * n_stream);
        ggml_set_input(inp->origin);
        ggml_set_name(inp->origin, "xkv_inp_origin");

        inp->mask = ggml_new_tensor_4d(gctx.ctx0, GGML_TYPE_F16, inp->n_slot, n_tps, 1, n_stream);
        ggml_set_input(inp->mask);
        ggml_set_name(inp->mask, "xkv_inp_mask");
    }
    return (llm_graph_input_xkv *) gctx.res->add_input(std::move(inp));
}

std::vector<xkv_span> xkv_spans(const xkv_view * view) {
    const uint32_t n = view->n_stream;
    if (view->store->shares_bases(view->stream_0, n)) {
        return { { 0, n } };
    }
    std::vector<xkv_span> res;
    for (uint32_t i = 0; i < n; ++i) {
        res.push_back({ i, 1 });
    }
    return res;
}

ggml_tensor * xkv_view_span(ggml_context * ctx, ggml_tensor * t, xkv_span span) {
    if (t->ne[3] == span.count) {
        return t;
    }
    return ggml_view_4d(ctx, t, t->ne[0], t->ne[1], t->ne[2], span.count, t->nb[1], t->nb[2], t->nb[3], span.first * t->nb[3]);
}

ggml_tensor * xkv_basis(const xkv_view * view, xkv_store::kind kd, int il, size_t is, xkv_span span) {
    return view->store->basis(kd, il, is, view->stream_0 + span.first);
}

static ggml_tensor * xkv_as_f32(ggml_context * ctx, ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 ? t : ggml_cast(ctx, t, GGML_TYPE_F32);
}

//
// materialized
//

ggml_tensor * xkv_coef(ggml_context * ctx, llm_graph_input_xkv * inp, xkv_store::kind kd, ggml_tensor * coef) {
    auto & res = inp->coef[coef];
    if (!res) {
        const int64_t n_stream = inp->view->n_stream;
        const int64_t ne0      = kd == xkv_store::kind::K ? coef->ne[0] : inp->n_slot;
        const int64_t ne1      = kd == xkv_store::kind::K ? inp->n_slot : coef->ne[1];
        res = ggml_view_4d(ctx, coef, ne0, ne1, 1, n_stream, coef->nb[1], coef->nb[2], coef->nb[2], inp->view->stream_0 * coef->nb[2]);
        res = ggml_cast(ctx, res, GGML_TYPE_F32);
        res = kd == xkv_store::kind::K ? res : ggml_cont(ctx, ggml_transpose(ctx, res));
    }
    return res;
}

ggml_tensor * xkv_v_of_k(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head_v) {
    return ggml_view_4d(ctx, k, n_embd_head_v, k->ne[1], k->ne[2], k->ne[3], k->nb[1], k->nb[2], k->nb[3], 0);
}

// K or V [n_embd_head, n_head_kv, n_slot, n_stream] of a layer's stored tokens, as type
static ggml_tensor * xkv_materialize(const llm_graph_context & gctx, llm_graph_input_xkv * inp, xkv_store::kind kd, ggml_type type,
                                     int il) {
    ggml_context * ctx  = gctx.ctx0;
    const auto &   view = *inp->view;
    const auto &   l    = view.store->layer_of(il);

    const int64_t n_embd_head = kd == xkv_store::kind::K ? gctx.hparams.n_embd_head_k(il) : gctx.hparams.n_embd_head_v(il);
    const int64_t n_head_kv   = gctx.hparams.n_head_kv(il);
    const int64_t n_stream    = inp->view->n_stream;

    const auto from_basis = [&](xkv_span span) {
        const auto & segments = view.store->groups()[l.ig].segments[kd];

        ggml_tensor * res = nullptr; // [n_embd, n_slot, 1, span]
        for (size_t is = 0; is < segments.size(); ++is) {
            ggml_tensor * t = xkv_view_span(ctx, xkv_coef(ctx, inp, kd, segments[is].coef), span);
            t               = xkv_from_coef(ctx, kd, xkv_basis(inp->view, kd, il, is, span), t);
            res             = res ? ggml_add(ctx, res, t) : t;
        }
        return res;
    };
    ggml_tensor * x = view.store->plain() ? xkv_coef(ctx, inp, kd, view.store->plain_segment(kd, il).coef) :
                                            xkv_concat_spans(ctx, inp->view, 3, from_basis);
    if (kd == xkv_store::kind::K) {
        x = ggml_add(ctx, x, l.mean_k);
        x = ggml_reshape_3d(ctx, x, n_embd_head, n_head_kv, inp->n_slot * n_stream);
        x = xkv_rotate(ctx, view.setup->model, view.setup->cparams, il, x, inp->origin);
    }
    x = type == GGML_TYPE_F32 ? x : ggml_cast(ctx, x, type);
    return ggml_reshape_4d(ctx, x, n_embd_head, n_head_kv, inp->n_slot, n_stream);
}

// q [n_embd_head, n_head, n_tokens], k and v [n_embd_head, n_head_kv, n_kv, n_stream]
static ggml_tensor * xkv_attn_materialized(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                                           ggml_tensor * v, ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx    = gctx.ctx0;
    const bool     v_in_k = inp->view->store->layer_of(il).v_in_k;

    const ggml_type type = k->type == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    // flash attention over a quantized window is slow on a CPU; quantized types are cast to f32 only
    k = k->type == type ? k : ggml_cast(ctx, xkv_as_f32(ctx, k), type);
    if (inp->n_slot > 0) {
        k = ggml_concat(ctx, xkv_materialize(gctx, inp, xkv_store::kind::K, type, il), k, 2);
    }
    if (v_in_k) {
        v = xkv_v_of_k(ctx, k, v->ne[0]);
        return gctx.build_attn_mha(q, k, v, nullptr, inp->mask_all, sinks, nullptr, 0, kq_scale, il);
    }
    v = v->type == type ? v : ggml_cast(ctx, xkv_as_f32(ctx, v), type);
    if (inp->n_slot > 0) {
        v = ggml_concat(ctx, xkv_materialize(gctx, inp, xkv_store::kind::V, type, il), v, 2);
    }
    return gctx.build_attn_mha(q, k, v, nullptr, inp->mask_all, sinks, nullptr, 0, kq_scale, il);
}

//
// hooks
//

static ggml_tensor * xkv_times(ggml_context * ctx, ggml_tensor * x, float scale) {
    if (scale == 1.0f) {
        return x;
    }
    x = ggml_is_contiguous(x) ? x : ggml_cont(ctx, x);      // can be a view of Q, K and V in one
    return ggml_scale(ctx, ggml_reshape(ctx, x, x), scale); // the strides of a single row can be any
}

ggml_tensor * xkv_prepare_k(ggml_context * ctx, const xkv_view * view, ggml_tensor * k_cur, int il) {
    return k_cur ? xkv_times(ctx, k_cur, view->setup->sidecar.scale[xkv_sidecar::K][il]) : nullptr;
}

ggml_tensor * xkv_prepare_v(ggml_context * ctx, const xkv_view * view, ggml_tensor * v_cur, int il) {
    if (!v_cur) {
        return nullptr;
    }
    ggml_tensor * mean = view->store->layer_of(il).mean_v;
    v_cur              = xkv_times(ctx, v_cur, view->setup->sidecar.scale[xkv_sidecar::V][il]);
    return ggml_sub(ctx, v_cur, ggml_reshape_2d(ctx, mean, v_cur->ne[0], v_cur->ne[1]));
}

// out [n_embd_head_v, n_head, n_tokens] through v_mla [n_embd_head_v, n, n_head]
static ggml_tensor * xkv_apply_v(ggml_context * ctx, ggml_tensor * out, ggml_tensor * v_mla, int64_t n_head, int64_t n_tokens) {
    out = ggml_reshape_3d(ctx, out, v_mla->ne[0], n_head, n_tokens);
    out = ggml_mul_mat(ctx, v_mla, ggml_permute(ctx, out, 0, 2, 1, 3)); // [n, n_tokens, n_head]
    return ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));
}

ggml_tensor * xkv_build_attn(const llm_graph_context & gctx, const xkv_view * view, ggml_tensor * mask, ggml_tensor * q, ggml_tensor * k,
                             ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il) {
    // reached when the context reserves its graphs, inside llama_init_from_model
    if (kq_b) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "layer %d adds a bias to its attention, which an xkv cache does not support yet; use kv_mode q8_0 or q4_0", il);
    }
    il = view->store->layer_of(il).il;

    if (!gctx.cparams.flash_attn) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "flash attention was turned off for this context, but an xkv cache needs it; set flash_attn_type to enabled");
    }

    auto * inp = xkv_get_input(gctx, view);

    // llama.cpp reserves graphs of some architectures for one sequence, whatever the number of streams; they are not computed
    if (mask->ne[3] != view->n_stream) {
        mask = ggml_reshape_4d(gctx.ctx0, mask, mask->ne[0], mask->ne[1] * mask->ne[3] / view->n_stream, 1, view->n_stream);
    }

    const auto & l      = view->store->layer_of(il);
    const auto & scale  = view->setup->sidecar.scale;
    const float  times  = kq_scale / scale[xkv_sidecar::K][il];
    const bool   packed = view->store->groups()[l.ig].packed;

    ggml_tensor * out;
    if (packed) {
        out = xkv_attn_packed(gctx, inp, q, k, v, mask, sinks, times, il);
    } else {
        if (!inp->mask_all) {
            inp->mask_all = inp->mask ? ggml_concat(gctx.ctx0, inp->mask, mask, 0) : mask;
        }
        out = (inp->absorb ? xkv_attn_absorbed : xkv_attn_materialized)(gctx, inp, q, k, v, sinks, times, il);
    }

    // softmax weights sum to one, so that what centring took from V comes back once; the sum is contiguous
    if (!l.v_in_k) {
        ggml_tensor * mean = l.mean_o;
        if (packed || inp->absorb) {
            mean = ggml_reshape_2d(gctx.ctx0, mean, out->ne[0], out->ne[1]);
        }
        out = ggml_add(gctx.ctx0, out, mean);
    } else if (!ggml_is_contiguous(out)) {
        out = ggml_cont(gctx.ctx0, out);
    }
    inp->out = out;
    out      = xkv_times(gctx.ctx0, out, 1.0f / scale[l.v_in_k ? xkv_sidecar::K : xkv_sidecar::V][il]);
    out      = v_mla ? xkv_apply_v(gctx.ctx0, out, v_mla, q->ne[1], q->ne[2]) : out;
    out      = ggml_reshape_2d(gctx.ctx0, out, ggml_nelements(out) / q->ne[2], q->ne[2]);
    ggml_build_forward_expand(gctx.gf, out);
    return out;
}

uint32_t xkv_attn_max_nodes(const xkv_store & store, const xkv_config & config) {
    uint32_t res = 0;
    for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
        uint32_t n_segment = 0;
        for (const auto & stage : config.stages) {
            if (stage.plain()) {
                continue; // one per layer
            }
            // without segments of V, those of K serve it as well
            const uint32_t n_k = stage.segments[0][ig].size();
            const uint32_t n_v = stage.segments[1][ig].size();
            n_segment          = std::max(n_segment, n_k + std::max(n_k, n_v));
        }
        const uint32_t n_span = config.online ? store.n_stream : 1;
        res += store.groups()[ig].layers.size() * (32 + n_span * (40 + 12 * n_segment));
    }
    return res;
}
