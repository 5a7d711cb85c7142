// The scope of a thread: parameters, checked as far as they can be without a model.

#include "cache/xkv-scope.h"

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "ops/xkv_attn/xkv-attn-op.h"
#include "store/xkv-store.h"

#include <algorithm>
#include <string>

static thread_local std::unique_ptr<xkv_scope> g_scope;

const xkv_scope * xkv_scope_now() {
    return g_scope.get();
}

ggml_type xkv_check_type(const std::string & name, int32_t type, std::initializer_list<ggml_type> allowed) {
    std::string names;
    for (ggml_type t : allowed) {
        if (type == t) {
            return t;
        }
        names += std::string(names.empty() ? "" : ", ") + ggml_type_name(t);
    }
    const bool known = type >= 0 && type < GGML_TYPE_COUNT && ggml_type_name((ggml_type) type);
    xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is %s, expected one of %s", name.c_str(),
              known ? ggml_type_name((ggml_type) type) : std::to_string(type).c_str(), names.c_str());
}

static uint32_t xkv_check_tokens(const char * name, int32_t value, int32_t min) {
    if (value < min || value > (1 << 24)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is %d tokens, expected %d to %d", name, value, min, 1 << 24);
    }
    return value;
}

static void xkv_check_noise(const std::string & name, float value) {
    if (!(value >= 0.0f && value < 1.0f)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s is %g, expected 0 to below 1", name.c_str(), value);
    }
}

static std::shared_ptr<xkv_sidecar> xkv_open_sidecar(const xkv_params & params) {
    if (params.sidecar) {
        return std::make_shared<xkv_sidecar>(params.sidecar);
    }
    if (!params.layers || !params.count || params.n_group == 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT,
                  "sidecar is NULL and there are no groups, expected the path of a file that xkv-gguf convert wrote, or layers and count");
    }
    if (params.frame != 32 && params.frame != 64 && params.frame != 128 && params.frame != 256) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "frame is %u tokens, expected 32, 64, 128 or 256", params.frame);
    }
    return std::make_shared<xkv_sidecar>(xkv_layer_lists(params.layers, params.count, params.n_group), params.frame);
}

static xkv_config::stage xkv_check_segments(const xkv_segment * list_in, uint32_t n_segment, const xkv_sidecar & sidecar) {
    xkv_config::stage res = {};

    const size_t n_group = sidecar.groups.size();
    if (!list_in) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "segments is NULL, expected at least one for K and V of each of %zu groups", n_group);
    }
    for (auto & segments : res.segments) {
        segments.resize(n_group);
    }
    for (uint32_t i = 0; i < n_segment; ++i) {
        const auto & seg = list_in[i];
        if (seg.group >= n_group || seg.kind > 1 || seg.rank == 0) {
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT,
                      "segment %u has group %u, kind %u and rank %u, expected a group below %zu, kind 0 or 1, a rank above 0", i, seg.group,
                      seg.kind, seg.rank, n_group);
        }
        const std::string what = "segment " + std::to_string(i) + ": ";
        const ggml_type   type = xkv_check_type(
            what + "type", seg.type,
            { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0, GGML_TYPE_Q1_0 });
        if (seg.kind == xkv_sidecar::V && sidecar.frame % xkv_block_size(type) != 0) {
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT,
                      "segment %u stores V as %s in blocks of %u tokens, but chunks are %u tokens; expected a frame of a multiple", i,
                      ggml_type_name(type), xkv_block_size(type), sidecar.frame);
        }
        const ggml_type type_basis = xkv_check_type(what + "type_basis", seg.type_basis,
                                                    { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0 });
        xkv_check_noise(what + "noise", seg.noise);
        res.segments[seg.kind][seg.group].push_back({ seg.rank, type, type_basis, seg.noise });
    }
    for (auto kd : { xkv_sidecar::K, xkv_sidecar::V }) {
        for (size_t g = 0; g < n_group; ++g) {
            const auto & list = res.segments[kd][g];
            // without calibration, whether V is kept is known when there is a model
            if (list.empty() && (kd == xkv_sidecar::K || sidecar.groups[g].dim[kd] > 0)) {
                xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "no segments for %c of group %zu, expected at least one",
                          kd == xkv_sidecar::K ? 'K' : 'V', g);
            }
            for (size_t i = 0; i + 1 < list.size(); ++i) {
                if (xkv_attn_type_index(list[i].type) >= xkv_attn_type_index(list[i + 1].type)) {
                    xkv_throw(XKV_STATUS_INVALID_ARGUMENT,
                              "segments %zu and %zu of %c of group %zu have types %s and %s, expected each type once, in the order f32, "
                              "f16, q8_0, q5_0, q4_0, q2_0, q1_0",
                              i, i + 1, kd == xkv_sidecar::K ? 'K' : 'V', g, ggml_type_name(list[i].type),
                              ggml_type_name(list[i + 1].type));
                }
                const uint32_t block = std::max(32u, kd == xkv_sidecar::K ? xkv_block_size(list[i].type) : 1);
                if (list[i].rank % block != 0) {
                    xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "segment %zu of %c of group %zu has rank %u, expected a multiple of %u", i,
                              kd == xkv_sidecar::K ? 'K' : 'V', g, list[i].rank, block);
                }
            }
        }
    }
    return res;
}

static void xkv_check_stages(const xkv_params & params, const xkv_sidecar & sidecar, xkv_config & config) {
    if (params.n_stage > 0 && !params.stages) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "stages is NULL, expected %u", params.n_stage);
    }
    for (uint32_t i = 0; i < params.n_stage; ++i) {
        const auto & from = params.stages[i];
        if (from.n_slot == 0 || from.n_slot % XKV_SLOT_PAD != 0 || (i > 0 && from.n_slot <= params.stages[i - 1].n_slot)) {
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "stage %u has %u slots, expected a multiple of %u above those of the stage before", i,
                      from.n_slot, XKV_SLOT_PAD);
        }
        config.stages.push_back(i == 0 && !from.segments ? xkv_config::stage() :
                                                           xkv_check_segments(from.segments, from.n_segment, sidecar));
        config.stages.back().n_slot = from.n_slot;
        if (config.stages.back().plain()) {
            xkv_check_noise("stage 0: noise", from.noise);
            config.stages.back().type  = xkv_check_type("stage 0: type", from.type, { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 });
            config.stages.back().noise = from.noise;
        }
    }
    config.stages.push_back(xkv_check_segments(params.segments, params.n_segment, sidecar));
    config.stages.back().n_slot = config.n_slot;
}

static void xkv_check_lead(const xkv_params & params, const char * name, int64_t n) {
    if (params.tolerance > 0.0f && (n <= 0 || n > UINT16_MAX || n % 32 != 0)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "%s: %lld directions, expected a multiple of 32 above 0", name, (long long) n);
    }
}

void xkv_scope_open(const xkv_params & params) {
    auto scope = std::make_unique<xkv_scope>();

    scope->sidecar = xkv_open_sidecar(params);

    auto & config      = scope->config;
    config.n_sink      = xkv_check_tokens("n_sink", params.n_sink, 0);
    config.n_text_sink = xkv_check_tokens("n_text_sink", params.n_text_sink, 0);
    config.n_window    = xkv_check_tokens("n_window", params.n_window, 1);
    config.n_absorb    = xkv_check_tokens("n_absorb", params.n_absorb, 0);
    config.n_prior     = xkv_check_tokens("n_prior", params.n_prior, 0);
    config.online      = params.online != 0;
    config.fused       = params.fused;
    config.n_keep      = params.n_keep;
    config.n_cell      = params.n_cell;
    config.n_slot      = params.n_slot;
    config.tolerance   = params.tolerance;
    config.n_lead      = params.n_lead;
    config.leads.assign(params.leads, params.leads + params.n_leads);
    if (params.fused < 0 || params.fused > (XKV_FUSED_CPU | XKV_FUSED_RPC | XKV_FUSED_OTHER)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "fused is %d, expected 0 to 7", params.fused);
    }
    if (!(params.tolerance >= 0.0f && params.tolerance <= 1.0f)) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "tolerance is %g, expected 0 to 1", params.tolerance);
    }
    xkv_check_lead(params, "n_lead", params.n_lead);
    for (uint32_t lead : config.leads) {
        xkv_check_lead(params, "leads", lead);
    }
    if (params.n_slot == 0 || params.n_slot % XKV_SLOT_PAD != 0) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "n_slot is %u tokens, expected a multiple of %u above 0", params.n_slot, XKV_SLOT_PAD);
    }
    if (!config.online && !scope->sidecar->calibrated()) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT,
                  "online is 0 and there is no sidecar, so that there would be no bases at all; pass a sidecar or set online to 1");
    }
    xkv_check_stages(params, *scope->sidecar, config);

    g_scope = std::move(scope);
}

void xkv_scope_close() {
    g_scope.reset();
}
