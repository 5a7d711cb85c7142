// Absorbed attention of the fused ops in native/ggml, for layers of the CPU.

#include "attn/xkv-attn.h"

#include "base/xkv-frame.h"
#include "ggml/xkv-cpu.h"

#include "llama-model.h"

#include "ggml-backend.h"

// the ops in the CPU backend that is loaded
struct xkv_cpu_ops {
    ggml_custom_op_t project;
    ggml_custom_op_t scores;
    ggml_custom_op_t gather;
    ggml_custom_op_t output;

    bool complete() const { return project && scores && gather && output; }
};

static const xkv_cpu_ops & xkv_get_cpu_ops() {
    static const xkv_cpu_ops ops = []() -> xkv_cpu_ops {
        ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!dev) {
            return {};
        }
        const auto get = [reg = ggml_backend_dev_backend_reg(dev)](const char * name) {
            return (ggml_custom_op_t) ggml_backend_reg_get_proc_address(reg, name);
        };
        return { get("xkv_cpu_project"), get("xkv_cpu_scores"), get("xkv_cpu_gather"), get("xkv_cpu_output") };
    }();
    return ops;
}

bool xkv_can_fuse(const xkv_view * view, int il) {
    const auto & store = *view->store;
    const auto * coef  = store.groups()[store.layer_of(il).ig].segments[xkv_store::kind::K][0].coef;

    // a layer's tensors share a buffer type
    return view->setup->config.fused && ggml_backend_buffer_get_type(coef->buffer) == ggml_backend_cpu_buffer_type() &&
           view->setup->model.hparams.n_embd_head_k(il) <= XKV_CPU_MAX_HEAD && xkv_get_cpu_ops().complete();
}

// what the ops of a layer point to; the graph's input owns it
struct xkv_fused_layer {
    xkv_cpu_layer                layer;
    std::vector<xkv_cpu_segment> segments[2];
};

static xkv_cpu_layer * xkv_make_layer(llm_graph_input_xkv * inp, int64_t n_head, int64_t n_head_kv, int il) {
    const auto & store    = *inp->view->store;
    const auto & gr       = store.groups()[store.layer_of(il).ig];
    const auto   n_stream = inp->view->n_stream;
    const auto   stream_0 = inp->view->stream_0;

    auto res = std::make_shared<xkv_fused_layer>();
    auto & l = res->layer;

    l.plain     = store.plain() && inp->n_slot > 0;
    l.n_head    = n_head;
    l.n_head_kv = n_head_kv;
    l.n_chunk   = store.n_chunk;
    l.n_frame   = inp->n_slot/store.n_chunk;
    l.mean_k    = (const float *) store.layer_of(il).mean_k->data;

    inp->fill.resize(l.n_frame*n_stream);
    l.fill = inp->fill.data();

    for (auto kd : { xkv_store::kind::K, xkv_store::kind::V }) {
        const auto add = [&](const xkv_store::segment & seg, uint32_t s, xkv_cpu_rows basis) {
            const ggml_tensor * coef = seg.coef;
            res->segments[kd].push_back({ l.rank[kd], seg.rank, { (const char *) coef->data + s*coef->nb[2], coef->type, coef->nb[1] }, basis });
            l.rank[kd] += seg.rank;
        };
        for (uint32_t s = stream_0; s < stream_0 + n_stream; ++s) {
            l.rank[kd] = 0;
            if (store.plain()) {
                add(store.plain_segment(kd, il), s, {});
                l.rank[kd] /= n_head_kv;
                continue;
            }
            for (size_t is = 0; is < gr.segments[kd].size(); ++is) {
                const ggml_tensor * basis = store.basis(kd, il, is, s);
                add(gr.segments[kd][is], s, { (const char *) basis->data, basis->type, basis->nb[1] });
            }
        }
        // without stored tokens there is nothing to go through
        l.rank     [kd] = inp->n_slot > 0 ? l.rank[kd] : 0;
        l.n_segment[kd] = res->segments[kd].size()/n_stream;
        l.segments [kd] = res->segments[kd].data();
    }
    inp->layers.push_back(res);
    return &res->layer;
}

static ggml_tensor * xkv_custom(ggml_context * ctx, ggml_custom_op_t fun, xkv_cpu_layer * layer, std::vector<ggml_tensor *> args, int64_t ne0,
                                int64_t ne1, int64_t ne2, int64_t ne3) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, ne0, ne1, ne2, ne3, args.data(), args.size(), fun, GGML_N_TASKS_MAX, layer);
}

ggml_tensor * xkv_attn_fused(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                             ggml_tensor * v, float kq_scale, int il) {
    ggml_context * ctx     = gctx.ctx0;
    const auto &   view    = *inp->view;
    const auto &   hparams = gctx.hparams;
    const auto &   ops     = xkv_get_cpu_ops();

    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head      = q->ne[1];
    const int64_t n_kv        = k->ne[2];
    const int64_t n_stream    = k->ne[3];
    const int64_t n_tps       = q->ne[2]/n_stream;
    const int64_t n_query     = n_head*n_tps;
    const int64_t n_slot      = inp->n_slot;

    auto * l = xkv_make_layer(inp, n_head, hparams.n_head_kv(il), il);
    l->scale = kq_scale;

    q = ggml_view_4d(ctx, q, n_embd_head, n_head, n_tps, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tps, 0);

    std::vector<ggml_tensor *> args = { q, k };
    if (n_slot > 0) {
        // every query in the frame of every chunk, then through the basis
        ggml_tensor * x = ggml_is_contiguous(q) ? q : ggml_cont(ctx, q);
        x = ggml_reshape_4d(ctx, x, n_embd_head, n_query, 1, n_stream);
        x = ggml_repeat_4d(ctx, x, n_embd_head, n_query, l->n_frame, n_stream);
        x = ggml_reshape_3d(ctx, x, n_embd_head, n_query, l->n_frame*n_stream);
        x = xkv_rotate(ctx, view.setup->model, view.setup->cparams, il, x, inp->origin);
        args.push_back(xkv_custom(ctx, ops.project, l, { x }, XKV_CPU_N_COEF(l->rank[0]), n_query, l->n_frame, n_stream));
    }
    ggml_tensor * kq = xkv_custom(ctx, ops.scores, l, args, n_slot + n_kv, n_tps, n_head, n_stream);

    const int64_t n_embd_head_v = v->ne[0];

    ggml_tensor * o = xkv_custom(ctx, ops.gather, l, { kq, v, inp->mask_all }, l->rank[1] + n_embd_head_v, n_query, n_stream, 1);
    return xkv_custom(ctx, ops.output, l, { o }, n_embd_head_v, n_head, n_tps, n_stream);
}
