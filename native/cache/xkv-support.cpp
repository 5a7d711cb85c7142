#include "cache/xkv-support.h"

#include "base/xkv-frame.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-model.h"

static thread_local xkv_probe * g_probe = nullptr;

xkv_probe::xkv_probe() {
    g_probe = this;
}

xkv_probe::~xkv_probe() {
    g_probe = nullptr;
}

xkv_probe * xkv_probe::current() {
    return g_probe;
}

xkv_layers xkv_pick_layers(const llama_model & model, const llama_memory_i::layer_filter_cb & filter_attn,
                           const llama_memory_i::layer_reuse_cb & reuse) {
    const auto & hparams = model.hparams;
    const bool   hybrid  = llm_arch_is_hybrid(model.arch);

    const auto attends = [&](uint32_t il) {
        return (filter_attn ? filter_attn(il) : !hybrid || !hparams.is_recr(il)) && hparams.n_head_kv(il) > 0 &&
               (hparams.swa_type == LLAMA_SWA_TYPE_NONE || !hparams.is_swa(il));
    };
    xkv_layers res;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        const int32_t from = reuse && attends(il) ? reuse(il) : -1;
        if (from >= 0) {
            res.shared[il] = from;
        } else if (attends(il) && hparams.has_kv(il)) {
            res.held.push_back(il);
        }
    }
    return res;
}

xkv_layers xkv_layers_of(const llama_model & model) {
    if (!model.hparams.causal_attn || model.hparams.vocab_only) {
        return {};
    }
    // what llama.cpp makes without asking us has to be small
    llama_cparams cparams = {};
    cparams.n_ctx         = 256;
    cparams.n_ctx_seq     = 256;
    cparams.n_batch       = 1;
    cparams.n_ubatch      = 1;
    cparams.n_seq_max     = 1;
    cparams.flash_attn    = true;
    cparams.kv_unified    = true;

    llama_memory_params params = {};
    params.type_k              = GGML_TYPE_F16;
    params.type_v              = GGML_TYPE_F16;

    xkv_probe probe;
    try {
        delete model.create_memory(params, cparams);
    } catch (const xkv_probed &) {
        // the layers are known
    }
    return probe.layers;
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
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return because("uses ALiBi");
    }
    if (model.arch == LLM_ARCH_PLM) { // its graph passes V in two dimensions, which aborts
        return "architecture plm does not run with flash attention in llama.cpp, and an xkv cache needs it; use kv_mode f16 with "
               "flash_attn False";
    }
    if (model.arch == LLM_ARCH_GROK) {
        return because("caps its attention scores in a way of its own");
    }
    const auto layers = xkv_layers_of(model).held;
    if (layers.empty() && hparams.indexer_head_size > 0) {
        return because("has an indexer that picks the tokens of each query");
    }
    if (layers.empty()) {
        return because("has no layers that keep plain K and V of all tokens");
    }
    for (uint32_t il : layers) {
        if (il >= hparams.n_layer()) {
            return because("attends in layers beyond those of its trunk");
        }
        if (hparams.n_embd_head_k(il) != hparams.n_embd_head_k(layers[0]) ||
            hparams.n_embd_head_v(il) != hparams.n_embd_head_v(layers[0])) {
            return because("has heads whose size differs from layer to layer");
        }
        if (xkv_v_in_k(hparams, il) && xkv_rope_first(model, il) < hparams.n_embd_head_v(il)) {
            return because("takes V from numbers of K that RoPE turns");
        }
    }
    return "";
}
