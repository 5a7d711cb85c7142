#pragma once

#include "attn/xkv-view.h"
#include "base/xkv-frame.h"

#include "llama-graph.h"

#include <map>
#include <memory>
#include <vector>

// Inputs that all layers of a graph share: what the queries of the micro-batch see of the store.
class llm_graph_input_xkv : public llm_graph_input_i {
public:
    llm_graph_input_xkv(const xkv_view * view, bool absorb);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * origin = nullptr; // I32, absorbed: [n_frame*n_stream] minus the chunk's position; else [n_slot*n_stream] plus
    ggml_tensor * mask   = nullptr; // F16 [n_slot, n_tokens/n_stream, 1, n_stream]

    // nodes that are built once per graph
    ggml_tensor * mask_all = nullptr; // mask of store and window

    std::map<const ggml_tensor *, ggml_tensor *> coef;  // per segment: f32 [rank, n_slot, 1, n_stream]
    std::map<const ggml_tensor *, ggml_tensor *> trans; // the same transposed, where K's coefficients serve V as well

    ggml_tensor * out = nullptr; // attention of the last layer: where it is, what the graph computes is

    // of packed groups
    ggml_tensor * frame = nullptr; // I32 [n_frame*n_stream] minus the chunk's position
    ggml_tensor * fill  = nullptr; // I32 [n_frame, n_tokens/n_stream, n_stream] tokens of the chunk that a query sees

    // pairs (1, 0) turned to the chunks' frames [n_rot, 1, n_frame*n_stream], per kind of RoPE
    std::map<xkv_rope, ggml_tensor *> turn;

    const xkv_view * view;

    const uint32_t n_slot;
    const uint32_t n_change; // of the store's bases
    const bool     absorb;
};

// coefficients of a segment, f32 [rank, n_slot, 1, n_stream]
ggml_tensor * xkv_coef(ggml_context * ctx, llm_graph_input_xkv * inp, xkv_store::kind kd, ggml_tensor * coef);

// the first numbers of each head of k [n_embd_head, n_head_kv, n, n_stream]
ggml_tensor * xkv_v_of_k(ggml_context * ctx, ggml_tensor * k, int64_t n_embd_head_v);

// consecutive streams of the micro-batch that use the same bases
struct xkv_span {
    uint32_t first; // counted from the first stream of the micro-batch
    uint32_t count;
};

std::vector<xkv_span> xkv_spans(const xkv_view * view);

// streams of a span of t [ne0, ne1, ne2, n_stream]
ggml_tensor * xkv_view_span(ggml_context * ctx, ggml_tensor * t, xkv_span span);

ggml_tensor * xkv_basis(const xkv_view * view, xkv_store::kind kd, int il, size_t is, xkv_span span);

// one result per span, beside each other along dim
template <typename F> ggml_tensor * xkv_concat_spans(ggml_context * ctx, const xkv_view * view, int dim, F && build) {
    ggml_tensor * res = nullptr;
    for (const auto & span : xkv_spans(view)) {
        ggml_tensor * t = build(span);
        res             = res ? ggml_concat(ctx, res, t, dim) : t;
    }
    return res;
}

// Absorbed attention of one layer, [n_embd_head, n_head, n_tps, n_stream], of stock ops.
// q [n_embd_head, n_head, n_tokens], k and v [n_embd_head, n_head_kv, n_kv, n_stream]
ggml_tensor * xkv_attn_absorbed(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                                ggml_tensor * v, ggml_tensor * sinks, float kq_scale, int il);

// the same of the op XKV_ATTN, where the layer's group is packed; mask: of the window
ggml_tensor * xkv_attn_packed(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v,
                              ggml_tensor * mask, ggml_tensor * sinks, float kq_scale, int il);

// graph nodes beyond the model's own
uint32_t xkv_attn_max_nodes(const xkv_store & store, const xkv_config & config);
