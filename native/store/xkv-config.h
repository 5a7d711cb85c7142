#pragma once

#include "ggml.h"

#include <cstdint>
#include <vector>

struct llama_cparams;
struct llama_model;

class xkv_sidecar;

// kinds of device on which attention is the op XKV_ATTN, if they have it
enum xkv_fused {
    XKV_FUSED_CPU   = 1,
    XKV_FUSED_RPC   = 2, // ggml takes it for granted that a server has every op
    XKV_FUSED_OTHER = 4,
};

// Checked copy of xkv_params. Sizes are in tokens.
struct xkv_config {
    struct segment {
        uint32_t  rank;
        ggml_type type;
        ggml_type type_basis;
        float     noise; // of type: mean squared error over variance
    };

    // A division of the store's bytes while at most n_slot tokens are stored: the fewer tokens, the more bits each.
    struct stage {
        uint32_t n_slot;

        std::vector<std::vector<segment>> segments[2]; // per kind and group, by descending variance

        // without segments: of K and V as they are
        ggml_type type  = GGML_TYPE_COUNT;
        float     noise = 0.0f;

        bool plain() const { return segments[0].empty(); }
    };

    uint32_t n_sink;
    uint32_t n_text_sink;
    uint32_t n_window;
    uint32_t n_absorb;
    bool     online;
    uint32_t n_prior;
    uint32_t fused;     // xkv_fused
    float    tolerance; // share of the softmax up to which a block of stored tokens counts by its lead alone
    uint32_t n_lead;    // directions of K and V

    std::vector<uint32_t> leads; // of the first layers, in place of it

    uint32_t lead(uint32_t il) const { return il < leads.size() ? leads[il] : n_lead; }

    // of a stream, for all its sequences
    uint32_t n_keep; // cells of the window that tokens stay in
    uint32_t n_cell; // those, and the ones through which a micro-batch passes
    uint32_t n_slot; // tokens that the store has room for

    std::vector<stage> stages; // by ascending n_slot; the last one's is the store's
};

// what stays the same while a cache lives; its owner outlives those who refer to it
struct xkv_setup {
    const llama_model &   model;
    const llama_cparams & cparams;
    const xkv_sidecar &   sidecar;
    const xkv_config &    config;
};
