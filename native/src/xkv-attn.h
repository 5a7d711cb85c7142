#pragma once

#include "llama-graph.h"

#include <map>

class llama_kv_cache_xkv_context;

// Inputs that all layers of a graph share: what the queries of the micro-batch see of the store.
class llm_graph_input_xkv : public llm_graph_input_i {
public:
    llm_graph_input_xkv(const llama_kv_cache_xkv_context * mctx, bool absorb);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    ggml_tensor * origin = nullptr; // I32, absorbed: [n_chunk*n_stream] minus the chunk's position; else [n_slot*n_stream] plus
    ggml_tensor * mask   = nullptr; // F16 [n_slot, n_tokens/n_stream, 1, n_stream]

    // nodes that are built once per graph
    ggml_tensor * mask_all = nullptr; // mask of store and window

    std::map<uint32_t, std::vector<ggml_tensor *>> coef[2]; // per kind, group and segment: f32 [rank, n_slot, 1, n_stream]

    const llama_kv_cache_xkv_context * mctx;

    const uint32_t n_slot;
    const uint32_t n_change; // of the store's bases
    const bool     absorb;
};
