// The hooks of llama_model::create_memory: what a model and a context have to be for an xkv cache, and the memory it is a part of.

#include "attn/xkv-attn.h"
#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "cache/xkv-cache-hooks.h"
#include "cache/xkv-composed.h"
#include "cache/xkv-scope.h"
#include "cache/xkv-support.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>
#include <memory>

static void xkv_check_heads(const llama_hparams & hparams, const xkv_sidecar::group & gr, ggml_type type_basis) {
    for (uint32_t il : gr.layers) {
        if (hparams.n_embd_head_k(il) % xkv_block_size(type_basis) != 0) {
            xkv_throw(XKV_STATUS_UNSUPPORTED,
                      "type_basis is %s, but the heads of layer %u have %u numbers, expected a multiple of %u; use f16",
                      ggml_type_name(type_basis), il, hparams.n_embd_head_k(il), xkv_block_size(type_basis));
        }
    }
}

// in a plain stage, a head's numbers are whole blocks
static void xkv_check_plain(const llama_hparams & hparams, const std::vector<uint32_t> & layers) {
    for (uint32_t il : layers) {
        const uint32_t n_k = hparams.n_embd_head_k(il);
        const uint32_t n_v = hparams.n_embd_head_v(il);
        if (n_k % 32 != 0 || n_v % 32 != 0) {
            xkv_throw(XKV_STATUS_UNSUPPORTED,
                      "stage 0 has no segments, but the heads of layer %u have %u numbers of K and %u of V, expected multiples of 32; "
                      "leave it out",
                      il, n_k, n_v);
        }
    }
}

static void xkv_check_ranks(const llama_hparams & hparams, const xkv_sidecar & sidecar, const xkv_config::stage & stage) {
    for (auto kd : { xkv_sidecar::K, xkv_sidecar::V }) {
        for (size_t g = 0; g < sidecar.groups.size(); ++g) {
            const char name = kd == xkv_sidecar::K ? 'K' : 'V';
            uint32_t   rank = 0;
            if (stage.segments[kd][g].empty() != (sidecar.groups[g].dim[kd] == 0)) {
                xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%zu segments for %c of group %zu, expected %s", stage.segments[kd][g].size(), name,
                          g, sidecar.groups[g].dim[kd] == 0 ? "none, as none is kept" : "at least one");
            }
            for (const auto & seg : stage.segments[kd][g]) {
                if (kd == xkv_sidecar::K) { // rows of V's bases are directions
                    xkv_check_heads(hparams, sidecar.groups[g], seg.type_basis);
                }
                rank += seg.rank;
            }
            if (rank > sidecar.groups[g].dim[kd]) {
                xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "the segments of %c of group %zu have rank %u in all, expected at most %u", name, g,
                          rank, sidecar.groups[g].dim[kd]);
            }
        }
    }
}

static void xkv_check_model(const llama_model & model, xkv_sidecar & sidecar, const xkv_config & config, const xkv_layers & picked) {
    const std::string reason = xkv_unsupported_reason(model);
    if (!reason.empty()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", reason.c_str());
    }
    const auto & hparams = model.hparams;
    const auto & layers  = picked.held;
    if (!sidecar.calibrated()) {
        std::vector<uint32_t> n_embd[2] = { std::vector<uint32_t>(hparams.n_layer(), 0), std::vector<uint32_t>(hparams.n_layer(), 0) };
        for (uint32_t il : layers) {
            n_embd[0][il] = hparams.n_embd_k_gqa(il);
            n_embd[1][il] = xkv_n_embd_v(hparams, il);
        }
        sidecar.set_embd(n_embd[0], n_embd[1]);
    }
    if (sidecar.n_embd[0].size() != hparams.n_layer()) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "sidecar %s is for %zu layers, the model has %u; run xkv-gguf convert for this model",
                  sidecar.path.c_str(), sidecar.n_embd[0].size(), hparams.n_layer());
    }
    std::vector<uint32_t> held;
    for (const auto & gr : sidecar.groups) {
        held.insert(held.end(), gr.layers.begin(), gr.layers.end());
    }
    std::sort(held.begin(), held.end());
    if (held != layers) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the groups hold %zu layers, expected the %zu of the model that keep K and V, each once",
                  held.size(), layers.size());
    }
    for (uint32_t il : layers) {
        if (sidecar.n_embd[0][il] != hparams.n_embd_k_gqa(il) || sidecar.n_embd[1][il] != xkv_n_embd_v(hparams, il)) {
            xkv_throw(
                XKV_STATUS_MODEL_MISMATCH,
                "sidecar %s has %u and %u numbers for K and V of layer %u, the model has %u and %u; run xkv-gguf convert for this model",
                sidecar.path.c_str(), sidecar.n_embd[0][il], sidecar.n_embd[1][il], il, hparams.n_embd_k_gqa(il),
                xkv_n_embd_v(hparams, il));
        }
    }
    for (const auto & stage : config.stages) {
        if (stage.plain()) {
            xkv_check_plain(hparams, layers);
        } else {
            xkv_check_ranks(hparams, sidecar, stage);
        }
    }
}

// what went wrong reaches the caller of llama_init_from_model as a null pointer only: the text stays in xkv_last_error()
template <typename F> static auto xkv_keep_error(F && f) {
    try {
        return f();
    } catch (...) {
        xkv_set_last_error(xkv_caught().text);
        throw;
    }
}

// windowed layers of the same memory, as llama.cpp's own would keep them by default: the window's type is for layers that are held
static std::unique_ptr<llama_kv_cache> xkv_make_windowed(const llama_model & model, const llama_memory_params & params,
                                                         const llama_cparams & cparams, const llama_memory_i::layer_filter_cb & filter_attn,
                                                         const llama_memory_i::layer_reuse_cb & reuse) {
    const auto &   hparams = model.hparams;
    const uint32_t n_swa   = hparams.n_swa * (cparams.kv_unified ? cparams.n_seq_max : 1) + cparams.n_ubatch;
    const uint32_t n_cell  = params.swa_full ? cparams.n_ctx_seq : GGML_PAD(std::min(cparams.n_ctx_seq, n_swa), 256);
    const bool     hybrid  = llm_arch_is_hybrid(model.arch);

    const auto filter = [&](int32_t il) { return (filter_attn ? filter_attn(il) : !hybrid || !hparams.is_recr(il)) && hparams.is_swa(il); };
    const ggml_type type = params.type_k == GGML_TYPE_F32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    return std::make_unique<llama_kv_cache>(model, hparams, type, type, /*v_trans =*/false, cparams.offload_kqv, cparams.kv_unified, n_cell,
                                            cparams.n_seq_max, 1, hparams.n_swa, hparams.swa_type, nullptr, filter, reuse, nullptr);
}

static std::unique_ptr<llama_memory_recurrent> xkv_make_recurrent(const llama_model & model, const llama_cparams & cparams,
                                                                  const llama_memory_i::layer_filter_cb & filter_recr) {
    const auto is_recr = [&](int32_t il) { return model.hparams.is_recr(il); };

    return std::make_unique<llama_memory_recurrent>(model, GGML_TYPE_F32, GGML_TYPE_F32, cparams.offload_kqv,
                                                    std::max(1u, cparams.n_seq_max), cparams.n_seq_max, cparams.n_rs_seq,
                                                    filter_recr ? filter_recr : llama_memory_i::layer_filter_cb(is_recr));
}

static void xkv_check_context(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                              const xkv_layers & layers) {
    if (!cparams.flash_attn) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "flash attention is off, but an xkv cache needs it; set flash_attn_type to enabled or auto");
    }
    if (!cparams.causal_attn || cparams.embeddings) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "an xkv cache is for causal text generation, not for embeddings; use kv_mode f16");
    }
    if (params.type_v != params.type_k) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "type_k and type_v are %s and %s, expected the same for both: they are the window's",
                  ggml_type_name(params.type_k), ggml_type_name(params.type_v));
    }
    xkv_check_type("type_k, the window's type,", params.type_k, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 });
    for (uint32_t il : layers.held) {
        const uint32_t block = xkv_block_size(params.type_k);
        if (model.hparams.n_embd_head_k(il) % block != 0 || model.hparams.n_embd_head_v(il) % block != 0) {
            xkv_throw(XKV_STATUS_UNSUPPORTED,
                      "the window's type is %s, but the heads of layer %u have %u and %u numbers, expected multiples of %u; use f16",
                      ggml_type_name(params.type_k), il, model.hparams.n_embd_head_k(il), model.hparams.n_embd_head_v(il), block);
        }
    }
}

llama_memory_i * xkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                                   const llama_memory_i::layer_filter_cb & filter_attn, const llama_memory_i::layer_filter_cb & filter_recr,
                                   const llama_memory_i::layer_reuse_cb & reuse) {
    if (auto * probe = xkv_probe::current()) {
        probe->layers = xkv_pick_layers(model, filter_attn, reuse);
        throw xkv_probed();
    }
    // layers of multi-token prediction, and those that look into another context's memory, are not ours
    if (!xkv_scope_now() || params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || cparams.ctx_other) {
        return nullptr;
    }
    return xkv_keep_error([&]() -> llama_memory_i * {
        const auto & scope  = *xkv_scope_now();
        const auto   layers = xkv_pick_layers(model, filter_attn, reuse);
        xkv_check_model(model, *scope.sidecar, scope.config, layers);
        xkv_check_context(model, params, cparams, layers);

        auto attn = std::make_unique<llama_kv_cache_xkv>(model, params, cparams, scope.sidecar, scope.config, layers);

        const bool windowed  = model.hparams.swa_type != LLAMA_SWA_TYPE_NONE;
        const bool recurrent = llm_arch_is_hybrid(model.arch);
        if (!windowed && !recurrent) {
            return attn.release();
        }
        return new xkv_composed(std::move(attn), windowed ? xkv_make_windowed(model, params, cparams, filter_attn, reuse) : nullptr,
                                recurrent ? xkv_make_recurrent(model, cparams, filter_recr) : nullptr, model.hparams.n_swa,
                                cparams.kv_unified);
    });
}

llama_memory_i * xkv_check_memory(llama_memory_i * mem) {
    if (!xkv_scope_now() || xkv_find(mem)) {
        return mem;
    }
    delete mem;
    return xkv_keep_error([]() -> llama_memory_i * {
        xkv_throw(
            XKV_STATUS_UNSUPPORTED,
            "this model does not keep a plain KV cache, and an xkv cache does not support its kind yet; use kv_mode f16, q8_0 or q4_0");
    });
}

uint32_t xkv_graph_max_nodes(llama_memory_i * mem) {
    const auto * xkv = xkv_find(mem);
    return xkv ? xkv_attn_max_nodes(*xkv->store, xkv->config) : 0;
}

int xkv_decode_failed(llama_context * ctx) {
    auto * xkv = xkv_find(llama_get_memory(ctx));
    if (!xkv) {
        throw;
    }
    xkv->guard("a batch", true, [] { throw; });
    return -2;
}
