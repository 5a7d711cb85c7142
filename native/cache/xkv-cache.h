#pragma once

#include "attn/xkv-view.h"
#include "format/xkv-sidecar.h"
#include "store/xkv-config.h"
#include "store/xkv-store.h"
#include "window/xkv-chunks.h"
#include "window/xkv-window.h"

#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;

class xkv_flow;
struct xkv_online_info;

// KV cache of exact sinks and recent tokens (a plain llama_kv_cache, the window) and of compressed older tokens (the
// store). Tokens enter through the window; before a micro-batch, whole chunks of the oldest leave it for the store.
class llama_kv_cache_xkv : public llama_memory_i {
public:
    // throws xkv_error
    llama_kv_cache_xkv(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                       std::shared_ptr<const xkv_sidecar> sidecar, const xkv_config & config);
    ~llama_kv_cache_xkv();

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    [[noreturn]] void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    [[noreturn]] void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // xkv specific API
    //

    // makes room in the window for the micro-batch: chunks leave it; false on failure (logged)
    bool flush(const llama_ubatch & ubatch);

    // slots that a graph has to look at for the streams [s0, s1], padded so that graphs can be reused
    uint32_t get_n_slot(uint32_t s0, uint32_t s1) const;

    // what graphs read for the streams [s0, s1]
    xkv_view view(uint32_t s0, uint32_t s1) const { return { &setup, store.get(), &tables, get_n_slot(s0, s1), s0, s1 - s0 + 1 }; }

    uint32_t get_stream(llama_seq_id seq_id) const { return window->get_stream(seq_id); }

    // tokens of a sequence that are exact (sinks, window) and that are compressed
    void seq_tokens(llama_seq_id seq_id, uint32_t & n_exact, uint32_t & n_stored) const;

    // how the bases of the sequence's stream followed its tokens
    xkv_online_info seq_online(llama_seq_id seq_id) const;

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // scratch, by part: bytes that do not grow with n_ctx, or are given back
    std::vector<std::pair<std::string, size_t>> scratch() const;

    // the last operation that was refused; reading it clears it
    std::string take_refusal();

    llama_kv_cache * get_window() const { return window->get(); }

    const xkv_config config;
    const uint32_t   n_seq_max;

    const std::shared_ptr<const xkv_sidecar> sidecar;

    std::unique_ptr<xkv_store> store;

private:
    const xkv_setup setup;

    std::unique_ptr<xkv_window>  window;
    std::vector<xkv_chunk_table> tables; // per stream
    std::unique_ptr<xkv_flow>    flow;

    uint32_t n_keep = 0; // cells of the window that tokens stay in; the others are for a micro-batch

    llama_context * lctx = nullptr;

    std::string refusal;
    bool        broken = false; // an operation was refused that the caller could not see fail

    void refuse(const char * fmt, ...);

    size_t window_bytes() const;

    // of the window's cells through which a micro-batch passes
    size_t transit() const;

    // what belongs to tokens that were removed: text sinks, and a stream's bases with its last token
    void drop_unused();

    // throws xkv_error, before anything is changed, when what remains of cut chunks has no room in the window
    void check_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    void seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
};

class llama_kv_cache_xkv_context : public llama_kv_cache_context {
public:
    // used for errors
    explicit llama_kv_cache_xkv_context(llama_memory_status status);

    // full cache
    explicit llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv);

    // batch
    llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv, std::vector<llama_ubatch> ubatches);

    bool apply() override;

    const xkv_view * as_xkv() const override { return &view; }

private:
    llama_kv_cache_xkv * const xkv;

    xkv_view view = {};
};
