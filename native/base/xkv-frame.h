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
