#pragma once

// What the patches of llama.cpp call: dispatch only, the logic lives elsewhere.

#include <cstdint>

struct ggml_context;
struct ggml_tensor;
struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llm_graph_context;

class llama_kv_cache_xkv_context;
class llm_graph_input_attn_kv;

// a new xkv cache when the thread is inside an xkv scope, else nullptr; throws xkv_error
llama_memory_i * xkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// passes mem through; throws xkv_error (and frees mem) when an xkv cache was asked for and mem is another kind
llama_memory_i * xkv_check_memory(llama_memory_i * mem);

// graph nodes that an xkv cache needs beyond the model's own
uint32_t xkv_graph_max_nodes(const llama_memory_i * mem);

// k_cur and v_cur [n_embd_head, n_head_kv, n_tokens] as the cache holds them: times the layer's scale, V minus its mean
ggml_tensor * xkv_prepare_k(ggml_context * ctx, const llama_kv_cache_xkv_context * mctx, ggml_tensor * k_cur, int il);
ggml_tensor * xkv_prepare_v(ggml_context * ctx, const llama_kv_cache_xkv_context * mctx, ggml_tensor * v_cur, int il);

// attention of one layer over store and window, in place of llm_graph_context::build_attn_mha
// k, v: views of the window
ggml_tensor * xkv_build_attn(
    const llm_graph_context & gctx,
    llm_graph_input_attn_kv * inp,
    ggml_tensor *             q,
    ggml_tensor *             k,
    ggml_tensor *             v,
    ggml_tensor *             kq_b,
    ggml_tensor *             sinks,
    float                     kq_scale,
    int                       il);
