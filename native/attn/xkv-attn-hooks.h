#pragma once

// What the patch of llm_graph_context::build_attn calls.

struct ggml_context;
struct ggml_tensor;
struct llm_graph_context;
struct xkv_view;

// k_cur and v_cur [n_embd_head, n_head_kv, n_tokens] as the cache holds them: times the layer's scale, V minus its mean; nullptr for
// layers that attend to another's
ggml_tensor * xkv_prepare_k(ggml_context * ctx, const xkv_view * view, ggml_tensor * k_cur, int il);
ggml_tensor * xkv_prepare_v(ggml_context * ctx, const xkv_view * view, ggml_tensor * v_cur, int il);

// attention of one layer over store and window, in place of llm_graph_context::build_attn_mha
// mask, k, v: of the window; v_mla: by head, what turns the first numbers of K into V, or nullptr
ggml_tensor * xkv_build_attn(const llm_graph_context & gctx, const xkv_view * view, ggml_tensor * mask, ggml_tensor * q, ggml_tensor * k,
                             ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, ggml_tensor * v_mla, float kq_scale, int il);
