#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

struct llama_cparams;
struct llama_model;

class xkv_sidecar;

// Checked copy of xkv_params. Sizes are in tokens.
struct xkv_config {
    struct segment {
        uint32_t  rank;
        ggml_type type;
        ggml_type type_basis;
    };

    // A division of the store's bytes while at most n_slot tokens are stored: the fewer tokens, the more bits each.
    struct stage {
        uint32_t n_slot;

        std::vector<std::vector<segment>> segments[2]; // per kind and group, by descending variance

        ggml_type type = GGML_TYPE_COUNT; // without segments: of K and V as they are

        bool plain() const { return segments[0].empty(); }
    };

    uint32_t  n_sink;
    uint32_t  n_text_sink;
    uint32_t  n_window;
    uint32_t  n_absorb;
    bool      online;
    uint32_t  n_prior;
    bool      fused;
    float     tolerance; // share of the softmax up to which a block of stored tokens counts by its lead alone
    uint32_t  n_lead;    // directions of K and V

    std::vector<stage> stages; // by ascending n_slot; the last one's is the store's
};

// what stays the same while a cache lives; its owner outlives those who refer to it
struct xkv_setup {
    const llama_model   & model;
    const llama_cparams & cparams;
    const xkv_sidecar   & sidecar;
    const xkv_config    & config;
};
