// The C API: argument checks, and exceptions turned into codes.

#include "api/xkv-guard.h"
#include "base/xkv-error.h"
#include "cache/xkv-capture.h"
#include "cache/xkv-composed.h"
#include "cache/xkv-scope.h"
#include "cache/xkv-support.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstring>

static llama_kv_cache_xkv * xkv_cast(const llama_context * ctx) {
    return xkv_find(llama_get_memory(ctx));
}

static const llama_kv_cache_xkv & xkv_cast_seq(const llama_context * ctx, int32_t seq_id) {
    const auto * xkv = xkv_cast(ctx);
    if (!xkv) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "the context's cache is not an xkv cache");
    }
    if (seq_id < 0 || (uint32_t) seq_id >= xkv->n_seq_max) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "seq_id is %d, expected 0 to %u", seq_id, xkv->n_seq_max - 1);
    }
    return *xkv;
}

void xkv_clear_error(void) {
    xkv_set_last_error("");
}

int xkv_model_check(const llama_model * model) {
    return xkv_guard([&] {
        xkv_require(model, "model");
        const std::string reason = xkv_unsupported_reason(*model);
        if (!reason.empty()) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", reason.c_str());
        }
    });
}

int xkv_model_layers(const llama_model * model, xkv_layer_info * layers, uint32_t * n_layer) {
    return xkv_guard([&] {
        xkv_require(model, "model");
        xkv_require(n_layer, "n_layer");
        const uint32_t room = *n_layer;
        const auto     list = xkv_layers_of(*model).held;
        *n_layer            = list.size();
        for (uint32_t i = 0; layers && i < std::min(room, *n_layer); ++i) {
            const auto &   hparams = model->hparams;
            const uint32_t il      = list[i];

            layers[i] = { il,
                          hparams.n_embd_k_gqa(il),
                          xkv_n_embd_v(hparams, il),
                          hparams.n_embd_head_k(il),
                          hparams.n_embd_head_v(il),
                          hparams.n_head(il),
                          model->layers[il].attn_sinks ? 1u : 0u };
        }
    });
}

int xkv_scope_begin(const xkv_params * params) {
    return xkv_guard([&] {
        xkv_require(params, "params");
        xkv_set_last_error("");
        xkv_scope_open(*params);
    });
}

void xkv_scope_end(void) {
    xkv_scope_close();
}

void xkv_attach(llama_context * ctx) {
    if (auto * xkv = ctx ? xkv_cast(ctx) : nullptr) {
        xkv->attach(ctx);
    }
}

int xkv_context_is_xkv(const llama_context * ctx) {
    return ctx && xkv_cast(ctx) ? 1 : 0;
}

static void xkv_list_parts(const std::vector<std::pair<std::string, size_t>> & list, xkv_report_part * parts, uint32_t * n_parts) {
    const uint32_t room = *n_parts;
    *n_parts            = list.size();
    for (uint32_t i = 0; parts && i < std::min(room, *n_parts); ++i) {
        parts[i] = {};
        strncpy(parts[i].name, list[i].first.c_str(), sizeof(parts[i].name) - 1);
        parts[i].bytes = list[i].second;
    }
}

int xkv_report(const llama_context * ctx, xkv_report_part * parts, uint32_t * n_parts) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(n_parts, "n_parts");

        std::vector<std::pair<std::string, size_t>> list;
        if (const auto * xkv = xkv_cast(ctx)) {
            list = xkv->parts();
            if (const auto * composed = dynamic_cast<const xkv_composed *>(llama_get_memory(ctx))) {
                const auto beside = composed->parts();
                list.insert(list.end(), beside.begin(), beside.end());
            }
        } else if (const auto * mem = llama_get_memory(ctx)) {
            size_t bytes = 0;
            for (const auto & [buft, size] : mem->memory_breakdown()) {
                bytes += size;
            }
            list.emplace_back("K and V", bytes);
        }

        xkv_list_parts(list, parts, n_parts);
    });
}

int xkv_scratch(const llama_context * ctx, xkv_report_part * parts, uint32_t * n_parts) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(n_parts, "n_parts");

        std::vector<std::pair<std::string, size_t>> list;
        if (const auto * xkv = xkv_cast(ctx)) {
            list = xkv->scratch();
        }
        size_t bytes = 0;
        for (const auto & [buft, size] : ctx->memory_breakdown()) {
            bytes += size.compute;
        }
        list.emplace_back("compute buffers", bytes);
        xkv_list_parts(list, parts, n_parts);
    });
}

int xkv_seq_tokens(const llama_context * ctx, int32_t seq_id, uint32_t * n_exact, uint32_t * n_stored) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(n_exact, "n_exact");
        xkv_require(n_stored, "n_stored");
        xkv_cast_seq(ctx, seq_id).seq_tokens(seq_id, *n_exact, *n_stored);
    });
}

int xkv_online(const llama_context * ctx, int32_t seq_id, xkv_online_info * info) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(info, "info");
        *info = xkv_cast_seq(ctx, seq_id).seq_online(seq_id);
    });
}

int xkv_context_refusal(llama_context * ctx) {
    auto * xkv = ctx ? xkv_cast(ctx) : nullptr;
    if (!xkv) {
        return XKV_STATUS_OK;
    }
    const auto refusal = xkv->take_refusal();
    if (refusal.status != XKV_STATUS_OK) {
        xkv_set_last_error(refusal.text);
    }
    return refusal.status;
}

int xkv_capture_new(llama_context * ctx, const uint32_t * layers, const uint32_t * count, uint32_t n_group, uint32_t frame, uint32_t n_sink,
                    xkv_capture ** capture) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(layers, "layers");
        xkv_require(count, "count");
        xkv_require(capture, "capture");
        *capture = new xkv_capture(ctx, xkv_layer_lists(layers, count, n_group), frame, n_sink);
    });
}

void xkv_capture_free(xkv_capture * capture) {
    delete capture;
}

int xkv_capture_add(xkv_capture * capture, int32_t seq_id) {
    return xkv_guard([&] {
        xkv_require(capture, "capture");
        capture->add(seq_id);
    });
}

int xkv_capture_read(const xkv_capture * capture, uint32_t group, int32_t kind, double * gram, double * sum, uint64_t * n_tokens) {
    return xkv_guard([&] {
        xkv_require(capture, "capture");
        xkv_require(gram, "gram");
        xkv_require(sum, "sum");
        xkv_require(n_tokens, "n_tokens");
        capture->read(group, kind, gram, sum, n_tokens);
    });
}

int xkv_capture_drop(xkv_capture * capture, uint32_t group, int32_t kind) {
    return xkv_guard([&] {
        xkv_require(capture, "capture");
        capture->drop(group, kind);
    });
}

int xkv_capture_get(xkv_capture * capture, int32_t seq_id, uint32_t group, int32_t kind, int32_t pos, uint32_t n, float * x) {
    return xkv_guard([&] {
        xkv_require(capture, "capture");
        xkv_require(x, "x");
        capture->get(seq_id, group, kind, pos, n, x);
    });
}

int xkv_capture_put(xkv_capture * capture, int32_t seq_id, uint32_t group, int32_t kind, int32_t pos, uint32_t n, const float * x) {
    return xkv_guard([&] {
        xkv_require(capture, "capture");
        xkv_require(x, "x");
        capture->put(seq_id, group, kind, pos, n, x);
    });
}
