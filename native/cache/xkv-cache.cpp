#include "cache/xkv-cache.h"

#include "base/xkv-error.h"
#include "base/xkv-memory.h"
#include "flow/xkv-flow.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <new>
#include <utility>

static uint32_t xkv_n_stream(const llama_cparams & cparams) {
    return cparams.kv_unified ? 1 : cparams.n_seq_max;
}

// sequences that can share a stream
static uint32_t xkv_n_seq_stream(const llama_cparams & cparams) {
    return cparams.kv_unified ? cparams.n_seq_max : 1;
}

llama_kv_cache_xkv::llama_kv_cache_xkv(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                                       std::shared_ptr<const xkv_sidecar> sidecar, const xkv_config & config, const xkv_layers & layers) :
    config(config), n_seq_max(cparams.n_seq_max), sidecar(sidecar), setup{ model, cparams, *sidecar, this->config } {
    const uint32_t n_chunk = sidecar->frame;
    const uint32_t n_exact = config.n_sink + config.n_window + n_chunk;
    if (cparams.n_ctx_seq <= n_exact) {
        xkv_throw(
            XKV_STATUS_INVALID_ARGUMENT,
            "n_ctx is %u tokens per sequence, expected more than sinks + window + chunk = %u + %u + %u; raise n_ctx or lower n_window",
            cparams.n_ctx_seq, config.n_sink, config.n_window, n_chunk);
    }

    const uint32_t n_stream = xkv_n_stream(cparams);
    const uint32_t n_seq    = xkv_n_seq_stream(cparams);

    const uint32_t n_stay = n_seq * (n_exact + config.n_text_sink);
    if (config.n_keep < n_stay || config.n_cell < n_stay + cparams.n_ubatch || config.n_cell < config.n_keep) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "n_keep and n_cell are %u and %u cells, expected at least %u, and that + n_ubatch = %u more",
                  config.n_keep, config.n_cell, n_stay, cparams.n_ubatch);
    }
    // each sequence of a stream can leave one chunk that is not full
    const uint32_t n_chunks = (cparams.n_ctx_seq - config.n_sink - config.n_window + n_chunk - 1) / n_chunk + n_seq;
    if (config.n_slot / n_chunk < n_chunks) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "n_slot is %u tokens, expected at least %u chunks of %u for n_ctx %u", config.n_slot,
                  n_chunks, n_chunk, cparams.n_ctx_seq);
    }

    store = std::make_unique<xkv_store>(model, *sidecar, config, layers, n_stream, cparams.offload_kqv);

    window = std::make_unique<xkv_window>(model, params, cparams, layers, config.n_cell);
    tables.assign(n_stream, xkv_chunk_table(n_chunk, store->n_slot / n_chunk));
    flow  = std::make_unique<xkv_flow>(setup, *store, *window, tables);
    spare = std::make_unique<llama_kv_cache_xkv_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);

    xkv_trim();
}

llama_kv_cache_xkv::~llama_kv_cache_xkv() = default;

llama_memory_context_ptr llama_kv_cache_xkv::failed_context(llama_memory_status status) noexcept {
    auto * res = new (std::nothrow) llama_kv_cache_xkv_context(status);
    return res ? llama_memory_context_ptr(res) : std::move(spare);
}

llama_memory_context_ptr llama_kv_cache_xkv::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) noexcept {
    GGML_UNUSED(embd_all);

    llama_memory_context_ptr res;
    return guard("a batch", false, [&] { res = prepare(balloc, n_ubatch); }) ? std::move(res) : failed_context();
}

llama_memory_context_ptr llama_kv_cache_xkv::prepare(llama_batch_allocr & balloc, uint32_t n_ubatch) {
    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = tables.size() == 1 ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return init_ubatches(std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_xkv::init_ubatches(std::vector<llama_ubatch> ubatches) {
    if (!spare) {
        spare = std::make_unique<llama_kv_cache_xkv_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }
    if (broken) {
        report();
        return failed_context();
    }

    for (const auto & ubatch : ubatches) {
        for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
            if (ubatch.seq_id_unq[s] >= (llama_seq_id) n_seq_max) {
                refuse("the batch has sequence %d, expected below n_seq_max = %u", ubatch.seq_id_unq[s], n_seq_max);
                return failed_context();
            }
        }
        // positions of the parts of an image differ, and chunks have one
        if (ubatch.embd && ubatch.n_pos > 1) {
            refuse("the batch has embeddings with %d positions each, as of an image; expected tokens, whose positions are one",
                   ubatch.n_pos);
            return failed_context();
        }
    }

    // a stream holds n_ctx_seq tokens, however they are kept
    std::vector<uint32_t> n_tokens(tables.size(), 0);
    for (const auto & ubatch : ubatches) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            n_tokens[get_stream(ubatch.seq_id[i][0])]++;
        }
    }
    for (uint32_t s = 0; s < tables.size(); ++s) {
        const uint32_t n = n_tokens[s] + window->n_used(s) + tables[s].n_token();
        if (n_tokens[s] > 0 && n > setup.cparams.n_ctx_seq) {
            return failed_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
    }

    return std::make_unique<llama_kv_cache_xkv_context>(this, std::move(ubatches));
}

// gives back what graphs have taken, so that it does not add to what a flush takes for a moment
static void xkv_drop_buffer(ggml_backend_buffer_t buf) {
    if (buf && ggml_backend_buffer_get_usage(buf) == GGML_BACKEND_BUFFER_USAGE_COMPUTE &&
        ggml_backend_buffer_get_type(buf) == ggml_backend_cpu_buffer_type()) {
        xkv_drop(ggml_backend_buffer_get_base(buf), ggml_backend_buffer_get_size(buf));
    }
}

void llama_kv_cache_xkv::flush(const llama_ubatch & ubatch) {
    // the next graph says anew where it is: the scheduler may replace the buffer before
    ggml_backend_buffer_t unused = std::exchange(graph_memory, nullptr);

    std::vector<uint32_t> n_new(tables.size(), 0);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        n_new[get_stream(ubatch.seq_id[i][0])]++;
    }
    // tokens stay exact until their room is needed; sequences without new tokens make room as well
    for (llama_seq_id seq_id = 0; seq_id < (llama_seq_id) n_seq_max; ++seq_id) {
        const uint32_t stream = get_stream(seq_id);
        if (n_new[stream] == 0 || window->n_used(stream) + n_new[stream] <= window->size()) {
            continue;
        }
        try {
            xkv_drop_buffer(std::exchange(unused, nullptr));
            flow->leave(lctx, seq_id);
        } catch (...) {
            broken = flow->half_changed() || broken;
            throw;
        }
    }
}

llama_memory_context_ptr llama_kv_cache_xkv::init_full() noexcept {
    graph_memory = nullptr;

    // llama.cpp looks for a context here, not at its status
    llama_memory_context_ptr res;
    guard("a full cache", false, [&] { res = std::make_unique<llama_kv_cache_xkv_context>(this); });
    return res;
}

// Nothing waits for an update where the context is known: K is turned, and streams are copied at once.
llama_memory_context_ptr llama_kv_cache_xkv::init_update(llama_context * lctx, bool optimize) noexcept {
    GGML_UNUSED(optimize);

    this->lctx = lctx;

    llama_memory_context_ptr res;
    const bool               shifted = window->has_shift();
    return guard("an update", shifted,
                 [&] {
                     settle();
                     res = std::make_unique<llama_kv_cache_xkv_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
                 }) ?
               std::move(res) :
               failed_context();
}

uint32_t llama_kv_cache_xkv::n_ctx_seq() const {
    return setup.cparams.n_ctx_seq;
}

void llama_kv_cache_xkv::clear(bool data) noexcept {
    guard("clearing the cache", true, [&] { empty(data); });
}

void llama_kv_cache_xkv::attach(llama_context * ctx) noexcept {
    lctx = ctx;

    const bool shifted = window->has_shift();
    guard("attaching", shifted, [&] { settle(); });
}

void llama_kv_cache_xkv::wait() {
    if (lctx) {
        lctx->synchronize();
    }
}

void llama_kv_cache_xkv::empty(bool data) {
    wait();
    get_window()->clear(data);
    for (auto & table : tables) {
        table.clear();
    }
    if (data || broken) {
        flow->restart(0); // a change of stage that failed has left bases and coefficients of neither stage
    }
    drop_unused();
    flow->half_changed(); // as it may be, nothing is left of it
    broken         = false;
    refusal.status = XKV_STATUS_OK;
}

void llama_kv_cache_xkv::drop_unused() {
    wait();
    window->drop_sinks();
    for (uint32_t s = 0; s < tables.size(); ++s) {
        if (tables[s].empty() && window->n_used(s) == 0) {
            flow->reset(s);
        }
    }
}

void llama_kv_cache_xkv::start_over() {
    for (uint32_t s = 0; lctx && s < tables.size(); ++s) {
        flow->start_over(lctx, s);
    }
}

xkv_online_info llama_kv_cache_xkv::seq_online(llama_seq_id seq_id) const {
    return flow->info(get_stream(seq_id));
}

uint32_t llama_kv_cache_xkv::get_n_slot(uint32_t s0, uint32_t s1) const {
    uint32_t n_slot = 0;
    for (uint32_t s = s0; s <= s1; ++s) {
        n_slot = std::max(n_slot, tables[s].n_slot());
    }
    return GGML_PAD(n_slot, XKV_SLOT_PAD);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_xkv::memory_breakdown() const noexcept {
    try {
        auto res = get_window()->memory_breakdown();
        for (const auto & [buft, bytes] : store->buffers()) {
            res[buft] += bytes;
        }
        return res;
    } catch (...) {
        xkv_set_last_error(xkv_caught().text);
        return {};
    }
}

std::vector<std::pair<std::string, size_t>> llama_kv_cache_xkv::parts() const {
    auto res = store->parts();

    res.emplace_back("sinks and window", window_bytes() - transit());
    return res;
}

size_t llama_kv_cache_xkv::window_bytes() const {
    size_t res = 0;
    for (const auto & [buft, bytes] : get_window()->memory_breakdown()) {
        res += bytes;
    }
    return res;
}

size_t llama_kv_cache_xkv::transit() const {
    return window_bytes() / window->size() * (window->size() - config.n_keep);
}

std::vector<std::pair<std::string, size_t>> llama_kv_cache_xkv::scratch() const {
    return {
        { "micro-batch in transit", transit() },
        { "flush and renewals", flow->peak() },
    };
}

void llama_kv_cache_xkv::refuse(const char * fmt, ...) noexcept {
    va_list args;
    va_start(args, fmt);
    vsnprintf(refusal.text, sizeof(refusal.text), fmt, args);
    va_end(args);

    refusal.status = XKV_STATUS_UNSUPPORTED;
    report();
}

void llama_kv_cache_xkv::fail(const char * what, bool changed, const xkv_failure & err) noexcept {
    broken         = broken || changed;
    refusal.status = err.status;
    snprintf(refusal.text, sizeof(refusal.text), "%s: %.900s%s", what, err.text, broken ? "; clear the cache" : "");
    report();
}

void llama_kv_cache_xkv::report() noexcept {
    xkv_set_last_error(refusal.text);
    try {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, refusal.text);
    } catch (...) {
        // long lines take memory
    }
}

xkv_failure llama_kv_cache_xkv::take_refusal() {
    const auto res = refusal;
    if (!broken) {
        refusal.status = XKV_STATUS_OK;
    }
    return res;
}

//
// llama_kv_cache_xkv_context
//

llama_kv_cache_xkv_context::llama_kv_cache_xkv_context(llama_memory_status status) : llama_kv_cache_context(status), xkv(nullptr) {}

llama_kv_cache_xkv_context::llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv) :
    llama_kv_cache_context(xkv->get_window()), xkv(xkv), view(xkv->view(sinfos[0].s0, sinfos[0].s1)) {
    view.n_slot = xkv->store->n_slot_now();
}

llama_kv_cache_xkv_context::llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(xkv->get_window(), {}, std::move(ubatches)), xkv(xkv) {
    sinfos.resize(this->ubatches.size()); // found micro-batch by micro-batch, after room was made
}

bool llama_kv_cache_xkv_context::apply() noexcept {
    return !xkv || xkv->guard("a micro-batch", false, [&] { place(ubatches[i_cur]); });
}

void llama_kv_cache_xkv_context::place(const llama_ubatch & ubatch) {
    xkv->flush(ubatch);

    sinfos[i_cur] = kv->find_slot(ubatch, false);
    if (sinfos[i_cur].empty()) {
        xkv_throw(XKV_STATUS_INTERNAL, "no room in the window for %u tokens", ubatch.n_tokens);
    }
    kv->apply_ubatch(sinfos[i_cur], ubatch);

    n_kv = kv->get_n_kv(sinfos[i_cur]);
    view = xkv->view(sinfos[i_cur].s0, sinfos[i_cur].s1);
}
