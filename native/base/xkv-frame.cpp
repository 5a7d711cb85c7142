#include "base/xkv-frame.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include "ggml.h"

#include <cmath>
#include <tuple>

static bool xkv_has_rope(const llama_hparams & hparams, uint32_t il) {
    return hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.has_rope(il);
}

uint32_t xkv_rope_first(const llama_model & model, uint32_t il) {
    const auto & hparams = model.hparams;
    if (!xkv_has_rope(hparams, il)) {
        return hparams.n_embd_head_k(il);
    }
    // heads made from a latent vector end with what is turned
    return hparams.n_lora_kv > 0 ? hparams.n_embd_head_k(il) - hparams.n_rot(il) : 0;
}

xkv_rope xkv_rope_of(const llama_model & model, const llama_cparams & cparams, uint32_t il) {
    const auto & hparams = model.hparams;

    if (!xkv_has_rope(hparams, il)) {
        return {};
    }
    xkv_rope res = {};
    res.n_rot    = hparams.n_rot(il);
    res.first    = xkv_rope_first(model, il);
    res.neox     = hparams.rope_type != LLAMA_ROPE_TYPE_NORM;
    // all positions of a text token are the same, and then sections turn as one
    res.type       = hparams.rope_type == LLAMA_ROPE_TYPE_NORM ? LLAMA_ROPE_TYPE_NORM : LLAMA_ROPE_TYPE_NEOX;
    res.n_ctx_orig = cparams.n_ctx_orig_yarn;
    res.freq_base  = model.get_rope_freq_base(cparams, il);
    res.freq_scale = model.get_rope_freq_scale(cparams, il);
    res.ext_factor = cparams.yarn_ext_factor;
    res.beta_fast  = cparams.yarn_beta_fast;
    res.beta_slow  = cparams.yarn_beta_slow;
    res.factors    = model.get_rope_factors(cparams, il);

    // ggml multiplies by this factor when ext_factor is set
    res.attn_factor = res.ext_factor != 0.0f ? 1.0f / (1.0f + 0.1f * logf(1.0f / res.freq_scale)) : 1.0f;
    return res;
}

bool xkv_rope::operator<(const xkv_rope & other) const {
    const auto key = [](const xkv_rope & r) {
        return std::make_tuple(r.n_rot, r.first, r.type, r.n_ctx_orig, r.freq_base, r.freq_scale, r.ext_factor, r.beta_fast, r.beta_slow,
                               r.factors);
    };
    return key(*this) < key(other);
}

static ggml_tensor * xkv_apply(ggml_context * ctx, const xkv_rope & rope, ggml_tensor * x, ggml_tensor * pos) {
    return ggml_rope_ext(ctx, x, pos, rope.factors, rope.n_rot, rope.type, rope.n_ctx_orig, rope.freq_base, rope.freq_scale,
                         rope.ext_factor, rope.attn_factor, rope.beta_fast, rope.beta_slow);
}

ggml_tensor * xkv_rotate(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, uint32_t il, ggml_tensor * x,
                         ggml_tensor * pos) {
    const auto rope = xkv_rope_of(model, cparams, il);
    if (rope.n_rot == 0) {
        return x;
    }
    x = xkv_apply(ctx, rope, x, pos);
    return rope.first > 0 ? ggml_rope_set_offset(x, rope.first) : x;
}

ggml_tensor * xkv_turn(ggml_context * ctx, const xkv_rope & rope, ggml_tensor * pos) {
    const int64_t n    = pos->ne[0];
    const int64_t half = rope.n_rot / 2;

    ggml_tensor * zeros = ggml_fill(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rope.neox ? half : 1, rope.neox ? 1 : half), 0.0f);
    ggml_tensor * ones  = ggml_fill(ctx, zeros, 1.0f);
    ggml_tensor * pairs = ggml_reshape_3d(ctx, ggml_concat(ctx, ones, zeros, 0), rope.n_rot, 1, 1);
    return xkv_apply(ctx, rope, ggml_repeat_4d(ctx, pairs, rope.n_rot, 1, n, 1), pos);
}
