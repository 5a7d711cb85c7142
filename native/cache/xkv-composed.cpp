#include "cache/xkv-composed.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <limits>
#include <utility>

xkv_composed::xkv_composed(std::unique_ptr<llama_kv_cache_xkv> attn, std::unique_ptr<llama_kv_cache> windowed,
                           std::unique_ptr<llama_memory_recurrent> recurrent, uint32_t n_swa, bool unified) :
    attn(std::move(attn)), windowed(std::move(windowed)), recurrent(std::move(recurrent)), n_swa(n_swa), unified(unified) {}

std::vector<llama_ubatch> xkv_composed::split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) const {
    balloc.split_reset();

    // a recurrent state takes its sequences in step, and can be rolled back within the last tokens of a micro-batch only
    const uint32_t n_last = recurrent && recurrent->n_rs_seq > 0 ? recurrent->n_rs_seq + 1 : 0;

    std::vector<llama_ubatch> res;
    while (true) {
        auto ubatch = recurrent && embd_all ? balloc.split_seq(n_ubatch) :
                      recurrent || !unified ? balloc.split_equal(n_ubatch, !unified, n_last) :
                                              balloc.split_simple(n_ubatch);
        if (ubatch.n_tokens == 0) {
            return res;
        }
        res.push_back(std::move(ubatch));
    }
}

llama_memory_context_ptr xkv_composed::compose(llama_memory_context_ptr a, llama_memory_context_ptr w, llama_memory_context_ptr r,
                                               std::vector<llama_ubatch> ubatches) const {
    if (!recurrent) {
        return std::make_unique<llama_kv_cache_iswa_context>(std::move(a), std::move(w), std::move(ubatches));
    }
    if (!windowed) {
        return std::make_unique<llama_memory_hybrid_context>(std::move(a), std::move(r), std::move(ubatches));
    }
    auto both = std::make_unique<llama_kv_cache_iswa_context>(std::move(a), std::move(w), ubatches);
    return std::make_unique<llama_memory_hybrid_iswa_context>(std::move(both), std::move(r), std::move(ubatches));
}

llama_memory_context_ptr xkv_composed::prepare(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    auto ubatches = split(balloc, n_ubatch, embd_all);
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return attn->failed_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    auto a = attn->init_ubatches(ubatches);
    if (llama_memory_status_is_fail(a->get_status())) {
        return a;
    }
    llama_memory_context_ptr w, r;
    if (windowed) {
        auto sinfos = windowed->prepare(ubatches);
        if (sinfos.empty()) {
            return attn->failed_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
        w = std::make_unique<llama_kv_cache_context>(windowed.get(), std::move(sinfos), ubatches);
    }
    if (recurrent) {
        if (!recurrent->prepare(ubatches)) {
            return attn->failed_context(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
        r = std::make_unique<llama_memory_recurrent_context>(recurrent.get(), ubatches);
    }
    return compose(std::move(a), std::move(w), std::move(r), std::move(ubatches));
}

llama_memory_context_ptr xkv_composed::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) noexcept {
    llama_memory_context_ptr res;
    const bool               ok = attn->guard("a batch", false, [&] { res = prepare(balloc, n_ubatch, embd_all); });
    return ok ? std::move(res) : attn->failed_context(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
}

llama_memory_context_ptr xkv_composed::init_full() noexcept {
    llama_memory_context_ptr res;
    attn->guard("a full cache", false, [&] {
        auto full = attn->init_full();
        if (full) {
            res = compose(std::move(full), windowed ? windowed->init_full() : nullptr, recurrent ? recurrent->init_full() : nullptr, {});
        }
    });
    return res;
}

llama_memory_context_ptr xkv_composed::init_update(llama_context * lctx, bool optimize) noexcept {
    llama_memory_context_ptr res;
    const bool               ok = attn->guard("an update", false, [&] {
        res = compose(attn->init_update(lctx, optimize), windowed ? windowed->init_update(lctx, optimize) : nullptr,
                      recurrent ? recurrent->init_update(lctx, optimize) : nullptr, {});
    });
    return ok ? std::move(res) : attn->failed_context(LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
}

void xkv_composed::clear(bool data) noexcept {
    each([&](llama_memory_i & mem) { mem.clear(data); });
}

bool xkv_composed::has_window(llama_seq_id seq_id, llama_pos p0) const {
    if (!windowed || p0 <= 0) {
        return true;
    }
    const llama_pos first = windowed->seq_pos_min(seq_id);
    return first < 0 || first <= std::max<llama_pos>(0, p0 - (llama_pos) n_swa + 1);
}

// what follows p0 looks at a window that may be forgotten; the caller begins anew
bool xkv_composed::is_forgotten(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const llama_pos last = attn->seq_pos_max(seq_id);
    return (p1 < 0 || p1 > last) && last >= p0 && !has_window(seq_id, p0);
}

bool xkv_composed::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) noexcept {
    const llama_seq_id n_seq = attn->n_seq_max;
    if (seq_id < 0 && p0 <= 0 && p1 < 0) {
        clear(true);
        return true;
    }
    if (seq_id < 0) {
        // of all or of none; a recurrent state says one by one whether it can forget a part
        for (llama_seq_id s = 0; s < n_seq; ++s) {
            if (recurrent || is_forgotten(s, p0, p1)) {
                return false;
            }
        }
        return attn->seq_rm(seq_id, p0, p1) && rm_beside(windowed.get(), seq_id, p0, p1);
    }
    if (seq_id < n_seq) {
        if (is_forgotten(seq_id, p0, p1)) {
            return false;
        }
        // a recurrent state would go back before the cache could refuse
        bool       changes = false;
        const bool room    = !recurrent || attn->guard("seq_rm", changes, [&] {
            attn->make_room(seq_id, std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1, changes);
        });
        if (!room) {
            return false;
        }
    }
    // a recurrent state seldom forgets a part, and says so before it changes anything
    return rm_beside(recurrent.get(), seq_id, p0, p1) && attn->seq_rm(seq_id, p0, p1) && rm_beside(windowed.get(), seq_id, p0, p1);
}

bool xkv_composed::rm_beside(llama_memory_i * mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) noexcept {
    bool       res = true;
    const bool ok  = attn->guard("seq_rm", true, [&] { res = !mem || mem->seq_rm(seq_id, p0, p1); });
    return ok && res;
}

void xkv_composed::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) noexcept {
    // between streams, all that there is
    const bool whole = !unified && seq_id_src != seq_id_dst;
    if (whole && recurrent && p1 >= 0 && p1 <= attn->seq_pos_max(seq_id_src)) {
        attn->refuse_positions("seq_cp", "a recurrent state cannot be copied as it was before its last token");
        return;
    }
    attn->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    beside("seq_cp", [&](llama_memory_i & mem) {
        mem.seq_cp(seq_id_src, seq_id_dst, whole ? -1 : p0, whole ? -1 : p1);
        if (whole && &mem == windowed.get()) {
            if (p0 > 0) {
                mem.seq_rm(seq_id_dst, 0, p0);
            }
            if (p1 >= 0) {
                mem.seq_rm(seq_id_dst, p1, -1);
            }
        }
    });
}

void xkv_composed::seq_keep(llama_seq_id seq_id) noexcept {
    attn->seq_keep(seq_id);
    beside("seq_keep", [&](llama_memory_i & mem) {
        mem.seq_keep(seq_id);
        // llama.cpp's own keeps the tokens of other streams
        for (llama_seq_id s = 0; s < (llama_seq_id) attn->n_seq_max; ++s) {
            if (s != seq_id) {
                mem.seq_rm(s, -1, -1);
            }
        }
    });
}

// Windowed layers that have forgotten tokens miss those that come nearer when others are taken out between.
bool xkv_composed::get_can_shift() const noexcept {
    return attn->get_can_shift() && (!windowed || (windowed->get_can_shift() && windowed->get_size() >= attn->n_ctx_seq()));
}

bool xkv_composed::can_move(const char * what) noexcept {
    if (attn->get_can_shift() && !get_can_shift()) {
        attn->refuse_positions(what, "windowed layers have forgotten tokens that would be in their window again; set swa_full");
    }
    return !attn->is_broken();
}

void xkv_composed::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) noexcept {
    if (can_move("seq_add")) {
        attn->seq_add(seq_id, p0, p1, shift);
        beside("seq_add", [&](llama_memory_i & mem) { mem.seq_add(seq_id, p0, p1, shift); });
    }
}

void xkv_composed::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) noexcept {
    if (can_move("seq_div")) {
        attn->seq_div(seq_id, p0, p1, d);
        beside("seq_div", [&](llama_memory_i & mem) { mem.seq_div(seq_id, p0, p1, d); });
    }
}

// what all parts know of a sequence
llama_pos xkv_composed::seq_pos_min(llama_seq_id seq_id) const noexcept {
    llama_pos res = -1;
    each([&](llama_memory_i & mem) { res = std::max(res, mem.seq_pos_min(seq_id)); });
    return res;
}

llama_pos xkv_composed::seq_pos_max(llama_seq_id seq_id) const noexcept {
    llama_pos res = attn->seq_pos_max(seq_id);
    each([&](llama_memory_i & mem) { res = std::min(res, mem.seq_pos_max(seq_id)); });
    return res;
}

std::map<ggml_backend_buffer_type_t, size_t> xkv_composed::memory_breakdown() const noexcept {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    each([&](llama_memory_i & mem) {
        for (const auto & [buft, bytes] : mem.memory_breakdown()) {
            res[buft] += bytes;
        }
    });
    return res;
}

std::vector<std::pair<std::string, size_t>> xkv_composed::parts() const {
    std::vector<std::pair<std::string, size_t>> res;

    const auto add = [&](const char * name, const llama_memory_i * mem) {
        if (!mem) {
            return;
        }
        res.emplace_back(name, 0);
        for (const auto & [buft, bytes] : mem->memory_breakdown()) {
            res.back().second += bytes;
        }
    };
    add("windowed layers", windowed.get());
    add("recurrent state", recurrent.get());
    return res;
}

// what llama.cpp leaves for its next batch: windowed K that are not turned yet, and streams that are not copied
void xkv_composed::settle() const {
    auto * lctx = attn->context();
    if (windowed && lctx) {
        llama_synchronize(lctx);
        lctx->memory_update(false);
    }
    if (windowed && windowed->get_has_shift()) {
        const char * why = "positions of windowed layers were shifted and their K is not turned; call xkv_attach, or decode a token first";
        xkv_set_last_error(why);
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s", why);
    }
}

void xkv_composed::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    settle();
    if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
        attn->state_write(io, seq_id, flags);
    }
    if (windowed) {
        windowed->state_write(io, seq_id, flags);
    }
    if (recurrent) {
        recurrent->state_write(io, seq_id, flags);
    }
}

void xkv_composed::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const llama_seq_id some   = std::max(seq_id, 0);
    const llama_pos    before = attn->seq_pos_max(some);

    bool taken = false;
    try {
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            attn->state_read(io, seq_id, flags);
        }
        taken = true;
        if (windowed) {
            windowed->state_read(io, seq_id, flags);
        }
        if (recurrent) {
            recurrent->state_read(io, seq_id, flags);
        }
    } catch (...) {
        const auto failure = xkv_caught();
        // what the xkv cache refuses changes nothing, unless its tokens are gone; the parts have to agree
        if (taken || attn->seq_pos_max(some) != before) {
            each([&](llama_memory_i & mem) {
                if (seq_id < 0) {
                    mem.clear(true);
                } else {
                    mem.seq_rm(seq_id, -1, -1);
                }
            });
        }
        xkv_set_last_error(failure.text);
        throw xkv_error(failure.status, failure.text);
    }
}

llama_kv_cache_xkv * xkv_find(llama_memory_i * mem) {
    if (auto * composed = dynamic_cast<xkv_composed *>(mem)) {
        return composed->attn.get();
    }
    return dynamic_cast<llama_kv_cache_xkv *>(mem);
}
