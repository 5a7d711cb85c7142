#pragma once

#include <cstdint>

struct ggml_context;
struct ggml_tensor;
struct llama_cparams;
struct llama_model;

// Rotates x [n_embd_head, n_head, n] by the model's RoPE for pos [n], as a pure rotation: YaRN's magnitude is not
// applied again. With the negative of a chunk's origin it takes roped keys and queries into the chunk's frame, with
// the origin it takes them back: R(n - p_c) k = R(-p_c) (R(n) k).
// Returns x itself for layers without RoPE.
ggml_tensor * xkv_rotate(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, uint32_t il, ggml_tensor * x,
                         ggml_tensor * pos);

// RoPE of a layer.
struct xkv_rope {
    int           n_rot; // numbers of a head that are turned; 0: none
    int           first; // the first one
    bool          neox;  // pairs (i, i + n_rot/2), else (2i, 2i + 1)
    int           type;
    int           n_ctx_orig;
    float         freq_base;
    float         freq_scale;
    float         ext_factor;
    float         attn_factor; // takes YaRN's magnitude away
    float         beta_fast;
    float         beta_slow;
    ggml_tensor * factors;

    bool operator<(const xkv_rope & other) const;
};

// the first number of a head that RoPE turns; all are before it where there is none
uint32_t xkv_rope_first(const llama_model & model, uint32_t il);

xkv_rope xkv_rope_of(const llama_model & model, const llama_cparams & cparams, uint32_t il);

// cosine and sine for pos [n] as the pairs (1, 0) turned [n_rot, 1, n]
ggml_tensor * xkv_turn(ggml_context * ctx, const xkv_rope & rope, ggml_tensor * pos);
