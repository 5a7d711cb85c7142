#pragma once

// What the patches of llama.cpp call where it makes and uses a llama_memory_i.

#include "llama-memory.h"

#include <cstdint>

struct llama_context;
struct llama_cparams;
struct llama_model;

// A new memory with an xkv cache in it when the thread is inside an xkv scope, else nullptr; throws xkv_error. Filters and reuse are
// those that llama.cpp's own memory would be made with; there is recurrent state where there is filter_recr or a hybrid model.
llama_memory_i * xkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                                   const llama_memory_i::layer_filter_cb & filter_attn, const llama_memory_i::layer_filter_cb & filter_recr,
                                   const llama_memory_i::layer_reuse_cb & reuse);

// passes mem through; throws xkv_error (and frees mem) when an xkv cache was asked for and mem has none
llama_memory_i * xkv_check_memory(llama_memory_i * mem);

// graph nodes that an xkv cache needs beyond the model's own
uint32_t xkv_graph_max_nodes(llama_memory_i * mem);

// Of the exception that is being handled, which a decode of the context threw: -2, and its xkv cache is broken until it is cleared,
// for what the batch changed is not known. Throws it again where there is no xkv cache.
int xkv_decode_failed(llama_context * ctx);

// llama_decode's callers are C, which no exception may pass
template <typename F> int xkv_decode(llama_context * ctx, F && f) {
    try {
        return f();
    } catch (...) {
        return xkv_decode_failed(ctx);
    }
}
