#pragma once

#include <cstdint>
#include <map>
#include <vector>

struct llama_hparams;

// Layers of a model that an xkv cache holds, and others that attend to what one of them keeps.
struct xkv_layers {
    std::vector<uint32_t>        held;   // ascending
    std::map<uint32_t, uint32_t> shared; // layer to the one whose K and V it attends to
};

// Whether V is the first numbers of each head of K, so that llama.cpp keeps no V of the layer: latents (MLA).
bool xkv_v_in_k(const llama_hparams & hparams, uint32_t il);

// numbers of V per token that are kept of a layer
uint32_t xkv_n_embd_v(const llama_hparams & hparams, uint32_t il);
