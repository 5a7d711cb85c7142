#include "base/xkv-frame.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include "ggml.h"

#include <cmath>

ggml_tensor * xkv_rotate(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, uint32_t il, ggml_tensor * x,
                         ggml_tensor * pos) {
    const auto & hparams = model.hparams;

    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return x;
    }
    const float freq_base  = model.get_rope_freq_base (cparams, il);
    const float freq_scale = model.get_rope_freq_scale(cparams, il);

    // ggml multiplies by this factor when ext_factor is set
    const float mscale = cparams.yarn_ext_factor != 0.0f ? 1.0f + 0.1f*logf(1.0f/freq_scale) : 1.0f;

    x = ggml_rope_ext(ctx, x, pos, model.get_rope_factors(cparams, il), hparams.n_rot(il), hparams.rope_type, cparams.n_ctx_orig_yarn,
                      freq_base, freq_scale, cparams.yarn_ext_factor, 1.0f/mscale, cparams.yarn_beta_fast, cparams.yarn_beta_slow);

    // heads that were made from a latent vector end with what is turned
    return hparams.n_lora_kv > 0 ? ggml_rope_set_offset(x, hparams.n_embd_head_k(il) - hparams.n_rot(il)) : x;
}
