// Attention of the op XKV_ATTN (ops/xkv_attn), for any number of queries.

#include "attn/xkv-attn.h"
#include "ops/xkv_attn/xkv-attn-op.h"

#include "llama-model.h"

// inputs that packed layers share
static void xkv_add_inputs(const llm_graph_context & gctx, llm_graph_input_xkv * inp) {
    if (inp->fill) {
        return;
    }
    const int64_t n_stream = inp->view->n_stream;
    const int64_t n_frame  = inp->n_slot / inp->view->store->n_chunk;

    inp->frame = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, n_frame * n_stream);
    ggml_set_input(inp->frame);
    ggml_set_name(inp->frame, "xkv_inp_frame");

    inp->fill = ggml_new_tensor_3d(gctx.ctx0, GGML_TYPE_I32, n_frame, gctx.n_tokens / n_stream, n_stream);
    ggml_set_input(inp->fill);
    ggml_set_name(inp->fill, "xkv_inp_fill");
}

static ggml_tensor * xkv_get_turn(const llm_graph_context & gctx, llm_graph_input_xkv * inp, int il) {
    const auto & setup = *inp->view->setup;
    const auto   rope  = xkv_rope_of(setup.model, setup.cparams, il);
    if (rope.n_rot == 0) {
        return nullptr;
    }
    auto & res = inp->turn[rope];
    if (!res) {
        res = xkv_turn(gctx.ctx0, rope, inp->frame);
        ggml_build_forward_expand(gctx.gf, res);
    }
    return res;
}

static xkv_attn_params xkv_make_params(const llm_graph_context & gctx, const llm_graph_input_xkv * inp, float kq_scale, int il) {
    const auto & view  = *inp->view;
    const auto & store = *view.store;
    const auto & gr    = store.groups()[store.layer_of(il).ig];
    const auto   rope  = xkv_rope_of(view.setup->model, view.setup->cparams, il);

    xkv_attn_params res = {};
    res.scale           = kq_scale;
    res.softcap         = gctx.hparams.attn_soft_cap ? gctx.hparams.f_attn_logit_softcapping : 0.0f;
    res.tolerance       = view.setup->config.tolerance;
    res.n_chunk         = store.n_chunk;
    res.rot_first       = rope.first;
    res.flags           = (store.plain() ? XKV_ATTN_PLAIN : 0) | (rope.neox ? XKV_ATTN_ROPE_NEOX : 0);
    for (auto kd : { xkv_store::kind::K, xkv_store::kind::V }) {
        res.lead[kd] = view.setup->config.lead(il);
        if (store.plain()) {
            const auto & seg                            = store.plain_segment(kd, il);
            res.rank[kd][xkv_attn_type_index(seg.type)] = seg.rank / seg.n_head;
            continue;
        }
        for (const auto & seg : gr.segments[kd]) {
            const int i     = xkv_attn_type_index(seg.type);
            res.rank[kd][i] = seg.rank;
            res.type_basis[i] |= xkv_attn_type_index(seg.type_basis) << 4 * kd;
        }
    }
    return res;
}

ggml_tensor * xkv_attn_packed(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                              ggml_tensor * mask, ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx   = gctx.ctx0;
    const auto &   view  = *inp->view;
    const auto &   store = *view.store;
    const auto &   l     = store.layer_of(il);
    const auto &   gr    = store.groups()[l.ig];

    const int64_t n_stream = k->ne[3];
    const int64_t n_tps    = q->ne[2] / n_stream;
    q                      = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tps, n_stream, q->nb[1], q->nb[2], q->nb[2] * n_tps, 0);

    const auto params = xkv_make_params(gctx, inp, kq_scale, il);
    if (inp->n_slot == 0) {
        return xkv_attn(ctx, { q, k, v, mask, nullptr, nullptr, nullptr, nullptr, nullptr, sinks }, &params);
    }
    xkv_add_inputs(gctx, inp);

    const int64_t n_frame = inp->n_slot / store.n_chunk;
    ggml_tensor * turn    = xkv_get_turn(gctx, inp, il);

    // the layer's own numbers in a plain store
    const size_t first = store.plain() ? store.plain_segment(xkv_store::kind::K, il).offset : 0;

    return xkv_concat_spans(ctx, &view, 3, [&](xkv_span span) {
        const auto part = [&](ggml_tensor * t) { return xkv_view_span(ctx, t, span); };

        ggml_tensor * coef = ggml_view_3d(ctx, gr.packed, gr.packed->ne[0] - first, n_frame, span.count, gr.packed->nb[1], gr.packed->nb[2],
                                          first + (view.stream_0 + span.first) * gr.packed->nb[2]);
        ggml_tensor * fill = span.count == n_stream ? inp->fill :
                                                      ggml_view_3d(ctx, inp->fill, n_frame, n_tps, span.count, inp->fill->nb[1],
                                                                   inp->fill->nb[2], span.first * inp->fill->nb[2]);
        ggml_tensor * pairs = !turn || span.count == n_stream ? turn :
                                                                ggml_view_3d(ctx, turn, turn->ne[0], 1, n_frame * span.count, turn->nb[1],
                                                                             turn->nb[2], span.first * n_frame * turn->nb[2]);
        ggml_tensor * basis = store.plain() ? nullptr : store.packed_basis(il, view.stream_0 + span.first);
        return xkv_attn(ctx, { part(q), part(k), part(v), part(mask), coef, basis, pairs, fill, l.mean_k, sinks }, &params);
    });
}
