#include "cache/xkv-support.h"

#include "llama-arch.h"
#include "llama-model.h"

std::vector<uint32_t> xkv_kv_layers(const llama_model & model) {
    std::vector<uint32_t> res;
    for (uint32_t il = 0; il < model.hparams.n_layer(); ++il) {
        if (model.hparams.has_kv(il) && model.hparams.n_head_kv(il) > 0) {
            res.push_back(il);
        }
    }
    return res;
}

std::string xkv_unsupported_reason(const llama_model & model) {
    const auto & hparams = model.hparams;

    const auto because = [&](const std::string & what) {
        return "architecture " + std::string(llm_arch_name(model.arch)) + " " + what +
               ", which an xkv cache does not support yet; use kv_mode f16, q8_0 or q4_0";
    };

    if (hparams.vocab_only) {
        return "the model was loaded with vocab_only, so that it has no KV cache";
    }
    if (llama_model_has_encoder(&model)) {
        return because("has an encoder");
    }
    if (!hparams.causal_attn || llm_arch_is_diffusion(model.arch)) {
        return because("attends in both directions");
    }
    if (llm_arch_is_recurrent(model.arch) || llm_arch_is_hybrid(model.arch)) {
        return because("has recurrent layers");
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        return because("has sliding-window layers");
    }
    if (hparams.is_mla()) {
        return because("caches latents (MLA)");
    }
    if (hparams.n_pos_per_embd() > 1) {
        return because("has positions of several dimensions (M-RoPE)");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return because("uses ALiBi");
    }
    if (hparams.n_layer_nextn > 0) {
        return because("has multi-token-prediction layers");
    }
    if (model.arch == LLM_ARCH_PLM) { // its graph passes V in two dimensions, which aborts
        return "architecture plm does not run with flash attention in llama.cpp, and an xkv cache needs it; use kv_mode f16 with "
               "flash_attn False";
    }
    if (hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) {
        return because("caps its attention scores");
    }
    const auto layers = xkv_kv_layers(model);
    if (layers.size() != hparams.n_layer()) {
        return because("has layers without a KV cache of their own");
    }
    for (uint32_t il : layers) {
        if (hparams.n_embd_k_gqa(il) != hparams.n_embd_k_gqa(layers[0]) || hparams.n_embd_v_gqa(il) != hparams.n_embd_v_gqa(layers[0])) {
            return because("has KV heads that differ from layer to layer");
        }
    }
    return "";
}
