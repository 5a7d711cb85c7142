// How a context comes to have an xkv cache: the scope of a thread, and the hooks of llama_model::create_memory.

#include "xkv-cache.h"
#include "xkv-error.h"
#include "xkv-hooks.h"
#include "xkv-scope.h"
#include "xkv-support.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include <memory>

struct xkv_scope {
    xkv_config                   config;
    std::unique_ptr<xkv_sidecar> sidecar;
};

static thread_local std::unique_ptr<xkv_scope> g_scope;

static ggml_type xkv_check_type(const char * name, int32_t type, std::initializer_list<ggml_type> allowed) {
    std::string names;
    for (ggml_type t : allowed) {
        if (type == t) {
            return t;
        }
        names += std::string(names.empty() ? "" : ", ") + ggml_type_name(t);
    }
    const bool known = type >= 0 && type < GGML_TYPE_COUNT && ggml_type_name((ggml_type) type);
    xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is %s, expected one of %s", name,
              known ? ggml_type_name((ggml_type) type) : std::to_string(type).c_str(), names.c_str());
}

static uint32_t xkv_check_tokens(const char * name, int32_t value, int32_t min) {
    if (value < min || value > (1 << 24)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is %d tokens, expected %d to %d", name, value, min, 1 << 24);
    }
    return value;
}

void xkv_scope_open(const xkv_params & params) {
    auto scope = std::make_unique<xkv_scope>();

    if (!params.sidecar) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "sidecar is NULL, expected the path of a file that xkv-gguf convert wrote");
    }
    scope->sidecar = std::make_unique<xkv_sidecar>(params.sidecar);

    auto &       config  = scope->config;
    const auto & sidecar = *scope->sidecar;

    config.n_sink   = xkv_check_tokens("n_sink",   params.n_sink,   0);
    config.n_window = xkv_check_tokens("n_window", params.n_window, 1);
    config.n_block  = xkv_check_tokens("n_block",  params.n_block,  1);
    config.n_absorb = xkv_check_tokens("n_absorb", params.n_absorb, 0);
    if (config.n_block % sidecar.frame != 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "n_block is %u tokens, expected a multiple of the sidecar's frame of %u", config.n_block, sidecar.frame);
    }

    config.type_coef[0] = xkv_check_type("type_coef_k", params.type_coef_k, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0 });
    config.type_coef[1] = xkv_check_type("type_coef_v", params.type_coef_v, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0 });
    config.type_basis   = xkv_check_type("type_basis",  params.type_basis,  { GGML_TYPE_F32, GGML_TYPE_F16 });

    const uint32_t * ranks[2] = { params.rank_k, params.rank_v };
    for (int kd = 0; kd < 2; ++kd) {
        if (ranks[kd] && params.n_group != sidecar.groups.size()) {
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "ranks for %u groups, expected %zu as in sidecar %s", params.n_group, sidecar.groups.size(),
                      sidecar.path.c_str());
        }
        for (size_t g = 0; g < sidecar.groups.size(); ++g) {
            const uint32_t rank = ranks[kd] ? ranks[kd][g] : sidecar.groups[g].rank[kd];
            if (rank == 0 || rank > sidecar.groups[g].dim[kd]) {
                xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "rank_%c of group %zu is %u, expected 1 to %u", kd == 0 ? 'k' : 'v', g, rank,
                          sidecar.groups[g].dim[kd]);
            }
            config.rank[kd].push_back(rank);
        }
    }

    g_scope = std::move(scope);
}

void xkv_scope_close() {
    g_scope.reset();
}

static void xkv_check_model(const llama_model & model, const xkv_sidecar & sidecar) {
    const std::string reason = xkv_unsupported_reason(model);
    if (!reason.empty()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", reason.c_str());
    }
    const auto & hparams = model.hparams;
    if (sidecar.n_embd[0].size() != hparams.n_layer()) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "sidecar %s is for %zu layers, the model has %u; run xkv-gguf convert for this model",
                  sidecar.path.c_str(), sidecar.n_embd[0].size(), hparams.n_layer());
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (sidecar.n_embd[0][il] != hparams.n_embd_k_gqa(il) || sidecar.n_embd[1][il] != hparams.n_embd_v_gqa(il)) {
            xkv_throw(XKV_STATUS_MODEL_MISMATCH, "sidecar %s has %u and %u numbers for K and V of layer %u, the model has %u and %u; run xkv-gguf convert for this model",
                      sidecar.path.c_str(), sidecar.n_embd[0][il], sidecar.n_embd[1][il], il, hparams.n_embd_k_gqa(il), hparams.n_embd_v_gqa(il));
        }
    }
}

// what went wrong reaches the caller of llama_init_from_model as a null pointer only: the text stays in xkv_last_error()
template <typename F> static auto xkv_keep_error(F && f) {
    try {
        return f();
    } catch (const std::exception & err) {
        xkv_set_last_error(err.what());
        throw;
    }
}

llama_memory_i * xkv_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (!g_scope) {
        return nullptr;
    }
    return xkv_keep_error([&]() -> llama_memory_i * {
        xkv_check_model(model, *g_scope->sidecar);
        if (!cparams.flash_attn) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "flash attention is off, but an xkv cache needs it; set flash_attn_type to enabled or auto");
        }
        if (!cparams.causal_attn || cparams.embeddings) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "an xkv cache is for causal text generation, not for embeddings; use kv_mode f16");
        }
        if ((params.type_k != GGML_TYPE_F16 && params.type_k != GGML_TYPE_F32) || params.type_v != params.type_k) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "type_k and type_v are %s and %s, but the window of an xkv cache is exact: expected f16 (or f32) for both",
                      ggml_type_name(params.type_k), ggml_type_name(params.type_v));
        }
        return new llama_kv_cache_xkv(model, params, cparams, *g_scope->sidecar, g_scope->config);
    });
}

llama_memory_i * xkv_check_memory(llama_memory_i * mem) {
    if (!g_scope || dynamic_cast<llama_kv_cache_xkv *>(mem)) {
        return mem;
    }
    delete mem;
    return xkv_keep_error([]() -> llama_memory_i * {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "this model does not keep a plain KV cache, and an xkv cache does not support its kind yet; use kv_mode f16, q8_0 or q4_0");
    });
}
