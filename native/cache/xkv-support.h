#pragma once

#include "base/xkv-layers.h"

#include "llama-memory.h"

#include <string>

struct llama_cparams;
struct llama_memory_params;
struct llama_model;

// layers that an xkv cache of the model holds: those with K and V of all tokens
xkv_layers xkv_layers_of(const llama_model & model);

// the same from what llama.cpp would make its own memory with
xkv_layers xkv_pick_layers(const llama_model & model, const llama_memory_i::layer_filter_cb & filter_attn,
                           const llama_memory_i::layer_reuse_cb & reuse);

// thrown to where the probe is
struct xkv_probed {};

// While it lives, this thread's llama_model::create_memory gives its layers to the probe and throws xkv_probed.
class xkv_probe {
public:
    xkv_probe();
    ~xkv_probe();

    xkv_layers layers;

    // of this thread, nullptr when there is none
    static xkv_probe * current();
};

// why a model cannot be used with an xkv cache, "" when it can
std::string xkv_unsupported_reason(const llama_model & model);
