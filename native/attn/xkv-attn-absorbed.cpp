// Absorbed attention of stock ops, for every backend.

#include "attn/xkv-attn.h"

#include "base/xkv-frame.h"

#include "llama-model.h"

// scores [n_slot, n_tps, n_head, span] of the stored tokens of a span; q [n_embd_head, n_head, n_tps, span]
static ggml_tensor * xkv_scores(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, int il, xkv_span span) {
    ggml_context * ctx  = gctx.ctx0;
    const auto &   view = *inp->view;
    const auto &   l    = view.store->layer_of(il);
    const auto &   gr   = view.store->groups()[l.ig];

    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head      = q->ne[1];
    const int64_t n_tps       = q->ne[2];
    const int64_t n_head_kv   = gctx.hparams.n_head_kv(il);
    const int64_t n_gqa       = n_head / n_head_kv;
    const int64_t n_stream    = span.count;
    const int64_t n_chunk     = view.store->n_chunk;
    const int64_t n_frame     = inp->n_slot / n_chunk;

    // every query in the frame of every chunk
    ggml_tensor * origin = ggml_view_1d(ctx, inp->origin, n_frame * n_stream, span.first * n_frame * inp->origin->nb[0]);

    q = ggml_is_contiguous(q) ? q : ggml_cont(ctx, q);
    q = ggml_reshape_4d(ctx, q, n_embd_head, n_head * n_tps, 1, n_stream);
    q = ggml_repeat_4d(ctx, q, n_embd_head, n_head * n_tps, n_frame, n_stream);
    q = ggml_reshape_3d(ctx, q, n_embd_head, n_head * n_tps, n_frame * n_stream);
    q = xkv_rotate(ctx, view.setup->model, view.setup->cparams, il, q, origin);

    // rows that share a KV head together
    const int64_t n_row = n_tps * n_frame * n_stream;
    q                   = ggml_reshape_4d(ctx, q, n_embd_head, n_gqa, n_head_kv, n_row);
    q                   = ggml_cont(ctx, ggml_permute(ctx, q, 0, 1, 3, 2)); // [n_embd_head, n_gqa, n_row, n_head_kv]
    q                   = ggml_reshape_3d(ctx, q, n_embd_head, n_gqa * n_row, n_head_kv);

    // back to rows per query: x [n, n_gqa*n_row, n_head_kv] as [n, n_head*n_tps, n_frame, n_stream]
    const auto by_query = [&](ggml_tensor * x) {
        const int64_t n = x->ne[0];
        x               = ggml_reshape_4d(ctx, x, n, n_gqa, n_row, n_head_kv);
        x               = ggml_cont(ctx, ggml_permute(ctx, x, 0, 1, 3, 2)); // [n, n_gqa, n_head_kv, n_row]
        return ggml_reshape_4d(ctx, x, n, n_head * n_tps, n_frame, n_stream);
    };

    ggml_tensor * mean   = ggml_reshape_3d(ctx, l.mean_k, n_embd_head, 1, n_head_kv);
    ggml_tensor * q_mean = by_query(ggml_mul_mat(ctx, mean, q));

    ggml_tensor * s = nullptr; // [n_chunk, n_head*n_tps, n_frame, n_stream]
    if (view.store->plain()) { // of one stream
        ggml_tensor * x = view.store->plain_segment(xkv_store::kind::K, il).coef;
        x               = ggml_view_4d(ctx, x, n_embd_head, n_chunk, n_frame, n_head_kv, x->nb[1], n_chunk * x->nb[1],
                                       ggml_row_size(x->type, n_embd_head), 0);
        s               = by_query(ggml_mul_mat(ctx, x, ggml_reshape_4d(ctx, q, n_embd_head, n_gqa * n_tps, n_frame, n_head_kv)));
    } else {
        // through the basis to the coefficients of the chunk
        for (size_t is = 0; is < gr.segments[xkv_store::kind::K].size(); ++is) {
            const auto & seg = gr.segments[xkv_store::kind::K][is];

            ggml_tensor * basis = xkv_basis(inp->view, xkv_store::kind::K, il, is, span);
            basis = ggml_view_3d(ctx, basis, n_embd_head, seg.rank, n_head_kv, basis->nb[1], ggml_row_size(basis->type, n_embd_head), 0);

            ggml_tensor * coef = seg.coef;
            coef            = ggml_view_4d(ctx, coef, seg.rank, n_chunk, n_frame, n_stream, coef->nb[1], n_chunk * coef->nb[1], coef->nb[2],
                                           (inp->view->stream_0 + span.first) * coef->nb[2]);
            ggml_tensor * t = ggml_mul_mat(ctx, coef, by_query(ggml_mul_mat(ctx, basis, q)));
            s               = s ? ggml_add(ctx, s, t) : t;
        }
    }

    // the sum lays the scores out by slot
    if (n_stream == 1) {
        s      = ggml_permute(ctx, ggml_reshape_4d(ctx, s, n_chunk, n_head, n_tps, n_frame), 0, 3, 2, 1);
        q_mean = ggml_permute(ctx, ggml_reshape_4d(ctx, q_mean, 1, n_head, n_tps, n_frame), 0, 3, 2, 1);
    } else {
        s      = ggml_permute(ctx, s, 0, 2, 1, 3);
        q_mean = ggml_permute(ctx, q_mean, 0, 2, 1, 3);
    }
    return ggml_reshape_4d(ctx, ggml_add(ctx, s, q_mean), inp->n_slot, n_tps, n_head, n_stream);
}

// coefficients of K with one row per direction, f32 [n_slot, rank, 1, n_stream]
static ggml_tensor * xkv_transposed(ggml_context * ctx, llm_graph_input_xkv * inp, ggml_tensor * coef) {
    auto & res = inp->trans[coef];
    res        = res ? res : ggml_cont(ctx, ggml_transpose(ctx, xkv_coef(ctx, inp, xkv_store::kind::K, coef)));
    return res;
}

// The same as xkv_output where V is the first numbers of each head of K. They are not turned, so that frames do not matter; what
// the window holds of them is not centred, so that the mean counts as often as stored tokens do.
static ggml_tensor * xkv_output_of_k(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * p, int il, xkv_span span) {
    ggml_context * ctx   = gctx.ctx0;
    const auto &   store = *inp->view->store;
    const auto &   l     = store.layer_of(il);

    const int64_t n_slot        = p->ne[0];
    const int64_t n_tps         = p->ne[1];
    const int64_t n_head        = p->ne[2];
    const int64_t n_stream      = span.count;
    const int64_t n_head_kv     = gctx.hparams.n_head_kv(il);
    const int64_t n_row         = n_tps * n_head / n_head_kv;
    const int64_t n_embd_head_k = gctx.hparams.n_embd_head_k(il);
    const int64_t n_embd_head_v = gctx.hparams.n_embd_head_v(il);

    // rows of the first numbers of each head
    const auto heads = [&](ggml_tensor * x) {
        return ggml_view_3d(ctx, x, x->ne[0], n_embd_head_v, n_head_kv, x->nb[1], n_embd_head_k * x->nb[1], 0);
    };

    ggml_tensor * total = ggml_reshape_4d(ctx, ggml_sum_rows(ctx, p), 1, n_row, n_head_kv, n_stream);
    ggml_tensor * o     = ggml_mul_mat(ctx, heads(ggml_reshape_2d(ctx, l.mean_k, 1, l.mean_k->ne[0])), total);
    if (store.plain()) { // of one stream
        ggml_tensor * x = xkv_transposed(ctx, inp, store.plain_segment(xkv_store::kind::K, il).coef);
        p               = ggml_view_3d(ctx, p, n_slot, n_row, n_head_kv, p->nb[1], n_row * p->nb[1], 0);
        o               = ggml_add(ctx, o, ggml_mul_mat(ctx, heads(x), p));
    } else {
        const auto & segments = store.groups()[l.ig].segments[xkv_store::kind::K];

        p = ggml_view_4d(ctx, p, n_slot, n_tps * n_head, 1, n_stream, p->nb[1], p->nb[3], p->nb[3], 0);
        for (size_t is = 0; is < segments.size(); ++is) {
            ggml_tensor * coef  = xkv_view_span(ctx, xkv_transposed(ctx, inp, segments[is].coef), span);
            ggml_tensor * basis = xkv_transposed_f32(ctx, xkv_basis(inp->view, xkv_store::kind::K, il, is, span));
            ggml_tensor * t     = ggml_mul_mat(ctx, coef, p); // [rank, n_tps*n_head, 1, n_stream]
            t                   = ggml_reshape_4d(ctx, t, segments[is].rank, n_row, n_head_kv, n_stream);
            o                   = ggml_add(ctx, o, ggml_mul_mat(ctx, heads(basis), t));
        }
    }
    return ggml_reshape_4d(ctx, o, n_embd_head_v, n_tps, n_head, n_stream);
}

// output [n_embd_head, n_tps, n_head, span] of the stored tokens of a span; p [n_slot, n_tps, n_head, span]
static ggml_tensor * xkv_output(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * p, int il, xkv_span span) {
    ggml_context * ctx   = gctx.ctx0;
    const auto &   store = *inp->view->store;
    const auto &   gr    = store.groups()[store.layer_of(il).ig];

    const int64_t n_slot      = p->ne[0];
    const int64_t n_tps       = p->ne[1];
    const int64_t n_head      = p->ne[2];
    const int64_t n_stream    = span.count;
    const int64_t n_head_kv   = gctx.hparams.n_head_kv(il);
    const int64_t n_embd_head = gctx.hparams.n_embd_head_v(il);

    ggml_tensor * o = nullptr; // [n_embd_head, n_tps*n_gqa, n_head_kv, n_stream]
    if (store.plain()) {       // of one stream
        ggml_tensor * x = store.plain_segment(xkv_store::kind::V, il).coef;
        x               = ggml_view_3d(ctx, x, n_slot, n_embd_head, n_head_kv, x->nb[1], n_embd_head * x->nb[1], 0);
        p = ggml_view_3d(ctx, p, n_slot, n_tps * n_head / n_head_kv, n_head_kv, p->nb[1], n_tps * n_head / n_head_kv * p->nb[1], 0);
        o = ggml_mul_mat(ctx, x, p);
    } else {
        p = ggml_view_4d(ctx, p, n_slot, n_tps * n_head, 1, n_stream, p->nb[1], p->nb[3], p->nb[3], 0);
        for (size_t is = 0; is < gr.segments[xkv_store::kind::V].size(); ++is) {
            const auto & seg = gr.segments[xkv_store::kind::V][is];

            ggml_tensor * basis = xkv_basis(inp->view, xkv_store::kind::V, il, is, span);
            ggml_tensor * coef  = seg.coef;
            coef                = ggml_view_4d(ctx, coef, n_slot, seg.rank, 1, n_stream, coef->nb[1], coef->nb[2], coef->nb[2],
                                               (inp->view->stream_0 + span.first) * coef->nb[2]);
            ggml_tensor * t     = ggml_mul_mat(ctx, coef, p); // [rank, n_tps*n_head, 1, n_stream]
            t                   = ggml_reshape_4d(ctx, t, seg.rank, n_tps * n_head / n_head_kv, n_head_kv, n_stream);

            basis = ggml_view_3d(ctx, basis, seg.rank, n_embd_head, n_head_kv, basis->nb[1], n_embd_head * basis->nb[1], 0);

            t = ggml_mul_mat(ctx, basis, t);
            o = o ? ggml_add(ctx, o, t) : t;
        }
    }
    return ggml_reshape_4d(ctx, o, n_embd_head, n_tps, n_head, n_stream);
}

ggml_tensor * xkv_attn_absorbed(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                                ggml_tensor * v, ggml_tensor * sinks, float kq_scale, int il) {
    ggml_context * ctx = gctx.ctx0;

    const int64_t n_head   = q->ne[1];
    const int64_t n_kv     = k->ne[2];
    const int64_t n_stream = k->ne[3];
    const int64_t n_tps    = q->ne[2] / n_stream;
    const int64_t n_slot   = inp->n_slot;

    // scores of the window
    q = ggml_view_4d(ctx, q, q->ne[0], n_head, n_tps, n_stream, q->nb[1], q->nb[2], q->nb[2] * n_tps, 0);
    ggml_tensor * kq =
        ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3)); // [n_kv, n_tps, n_head, n_stream]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (n_slot > 0) {
        ggml_tensor * s = xkv_concat_spans(ctx, inp->view, 3,
                                           [&](xkv_span span) { return xkv_scores(gctx, inp, xkv_view_span(ctx, q, span), il, span); });
        kq              = ggml_concat(ctx, s, kq, 0);
    }
    if (gctx.hparams.attn_soft_cap) {
        const float cap = gctx.hparams.f_attn_logit_softcapping;

        kq       = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, kq, kq_scale / cap)), cap);
        kq_scale = 1.0f;
    }
    kq = ggml_soft_max_ext(ctx, kq, inp->mask_all, kq_scale, 0.0f);
    ggml_soft_max_add_sinks(kq, sinks);

    // output of the window
    v = ggml_is_quantized(v->type) ? ggml_cast(ctx, v, GGML_TYPE_F32) : v;
    v = ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3)); // [n_kv, n_embd_head, n_head_kv, n_stream]

    ggml_tensor * p_w = ggml_view_4d(ctx, kq, n_kv, n_tps, n_head, n_stream, kq->nb[1], kq->nb[2], kq->nb[3], n_slot * kq->nb[0]);
    ggml_tensor * out = ggml_mul_mat(ctx, v, p_w); // [n_embd_head, n_tps, n_head, n_stream]

    // output of the store
    if (n_slot > 0) {
        ggml_tensor * p_s = ggml_view_4d(ctx, kq, n_slot, n_tps, n_head, n_stream, kq->nb[1], kq->nb[2], kq->nb[3], 0);
        out               = ggml_add(ctx, out, xkv_concat_spans(ctx, inp->view, 3, [&](xkv_span span) {
                           const bool v_in_k = inp->view->store->layer_of(il).v_in_k;
                           return (v_in_k ? xkv_output_of_k : xkv_output)(gctx, inp, xkv_view_span(ctx, p_s, span), il, span);
                       }));
    }

    return ggml_permute(ctx, out, 0, 2, 1, 3); // [n_embd_head, n_head, n_tps, n_stream]
}
