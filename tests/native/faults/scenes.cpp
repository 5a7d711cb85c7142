#include "scenes.h"

#include "format/xkv-sidecar.h"
#include "xkv.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

static const int32_t N_CTX   = 1024;
static const int32_t N_BATCH = 64;

scenes::scenes(const char * model, const char * sidecar, std::string folder) :
    sidecar(sidecar), folder(std::move(folder)), model(llama_model_load_from_file(model, llama_model_default_params())) {
    if (!this->model) {
        fprintf(stderr, "%s does not load\n", model);
        exit(1);
    }
}

llama_context * scenes::open(int32_t n_times) const {
    std::vector<xkv_segment> middle;
    std::vector<xkv_segment> last;
    std::vector<xkv_stage>   stages;
    xkv_params               params = {};
    try {
        const xkv_sidecar file(sidecar);
        for (uint32_t g = 0; g < file.groups.size(); ++g) {
            for (uint32_t kd = 0; kd < 2; ++kd) {
                const uint32_t dim = file.groups[g].dim[kd];
                middle.push_back({ g, kd, dim / 2, GGML_TYPE_Q5_0, GGML_TYPE_Q8_0, 0.0f }); // more would not fit into the last one
                last.push_back({ g, kd, dim / 2, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, 0.01f });
            }
        }
        stages = {
            { 256u * n_times, nullptr, 0, GGML_TYPE_Q8_0, 0.0f },
            { 512u * n_times, middle.data(), (uint32_t) middle.size(), GGML_TYPE_F32, 0.0f },
        };
    } catch (...) {
        return nullptr;
    }
    params.sidecar     = sidecar.c_str();
    params.segments    = last.data();
    params.n_segment   = (uint32_t) last.size();
    params.stages      = stages.data();
    params.n_stage     = (uint32_t) stages.size();
    params.n_sink      = 4;
    params.n_text_sink = 2;
    params.n_window    = 40;
    params.n_absorb    = 8;
    params.online      = 1;
    params.n_prior     = 1;
    params.fused       = 1;
    params.n_lead      = 32;
    params.n_keep      = 128;
    params.n_cell      = 256;
    params.n_slot      = N_CTX * n_times;
    if (xkv_scope_begin(&params) != XKV_STATUS_OK) {
        return nullptr;
    }
    auto cparams            = llama_context_default_params();
    cparams.n_ctx           = N_CTX * n_times;
    cparams.n_batch         = N_BATCH;
    cparams.n_ubatch        = N_BATCH;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    llama_context * ctx     = llama_init_from_model(model, cparams);
    xkv_scope_end();
    return ctx;
}

llama_batch_ext * scenes::batch(llama_context * ctx, int32_t pos, int32_t n) const {
    if (!ctx) {
        return nullptr;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    auto *        res     = llama_batch_ext_init(ctx);
    for (int32_t i = 0; i < n; ++i) {
        const int32_t id = llama_batch_ext_add_token(res, 0, (pos + i) * 7919 % 104729 % n_vocab);
        const int32_t at = pos + i;
        llama_batch_ext_set_pos(res, id, &at);
        llama_batch_ext_set_output_logits(res, id, i + 1 == n);
    }
    return res;
}

int scenes::decode(llama_context * ctx, int32_t pos, int32_t n) const {
    int res = 0;
    for (int32_t i = 0; i < n && res == 0; i += N_BATCH) {
        auto * next = batch(ctx, pos + i, std::min(N_BATCH, n - i));
        res         = llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, next);
        llama_batch_ext_free(next);
    }
    return res;
}

std::vector<float> scenes::logits(llama_context * ctx) const {
    const float * data = llama_get_logits_ith(ctx, -1);
    return std::vector<float>(data, data + llama_vocab_n_tokens(llama_model_get_vocab(model)));
}

std::vector<float> scenes::prompt(llama_context * ctx) const {
    return decode(ctx, 0, 256 + N_BATCH) == 0 ? logits(ctx) : std::vector<float>();
}

// 256 tokens fill the window; then every third batch has chunks leave it, at 448 for a stage with bases, at 640 for the last one
std::vector<scene> list_scenes() {
    const auto decode = [](const scenes &, llama_context *& ctx, llama_batch_ext * next) {
        return llama_process(ctx, LLAMA_PROCESS_TYPE_DECODE, next) == 0;
    };
    const auto seq_rm_from = [](int32_t pos) {
        return [pos](const scenes &, llama_context *& ctx, llama_batch_ext *) {
            return llama_memory_seq_rm(llama_get_memory(ctx), 0, pos, -1);
        };
    };
    const auto seq_rm_inside = [](const scenes &, llama_context *& ctx, llama_batch_ext *) {
        return llama_memory_seq_rm(llama_get_memory(ctx), 0, 300, 400);
    };
    // these have no other way to say it
    const auto seq_add = [](const scenes &, llama_context *& ctx, llama_batch_ext *) {
        llama_memory_seq_add(llama_get_memory(ctx), 0, 150, -1, -50);
        return xkv_context_refusal(ctx) == XKV_STATUS_OK;
    };
    const auto seq_div = [](const scenes &, llama_context *& ctx, llama_batch_ext *) {
        llama_memory_seq_div(llama_get_memory(ctx), 0, 150, -1, 2);
        return xkv_context_refusal(ctx) == XKV_STATUS_OK;
    };
    const auto save = [](const scenes &, llama_context *& ctx, llama_batch_ext *) {
        std::vector<uint8_t> data;
        try {
            data.resize(llama_state_get_size(ctx));
        } catch (...) {
            return false; // the program's own
        }
        return !data.empty() && llama_state_get_data(ctx, data.data(), data.size()) == data.size();
    };
    const auto load_from = [](std::string (scenes::*path)() const) {
        return [path](const scenes & all, llama_context *& ctx, llama_batch_ext *) {
            llama_token tokens[4];
            size_t      n = 0;
            try {
                xkv_attach(ctx);
                return llama_state_load_file(ctx, (all.*path)().c_str(), tokens, 4, &n);
            } catch (...) {
                return false; // upstream's, for the path's text
            }
        };
    };
    const auto open  = [](const scenes & all, llama_context *& ctx, llama_batch_ext *) { return (ctx = all.open()) != nullptr; };
    const auto clear = [](const scenes &, llama_context *& ctx, llama_batch_ext *) {
        llama_memory_clear(llama_get_memory(ctx), true);
        return true;
    };
    return {
        { "open", -1, 1, open },
        { "flush", 256, 1, decode },
        { "flush by two threads", 256, 2, decode },
        { "stage with bases", 448, 1, decode },
        { "stage with bases by two threads", 448, 2, decode },
        { "last stage", 640, 1, decode },
        { "last stage by two threads", 640, 2, decode },
        { "seq_rm", 700, 1, seq_rm_from(333) },
        { "seq_rm of most", 700, 1, seq_rm_from(150) },
        { "seq_rm inside", 700, 1, seq_rm_inside },
        { "seq_add", 700, 1, seq_add },
        { "seq_div", 700, 1, seq_div },
        { "clear", 700, 1, clear },
        { "state write", 700, 1, save },
        { "state read", 300, 1, load_from(&scenes::state_path) },
        { "state read of another n_ctx", 0, 1, load_from(&scenes::moved_path) },
    };
}
