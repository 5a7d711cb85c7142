#pragma once

#include "attn/xkv-view.h"
#include "base/xkv-error.h"
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

class xkv_bytes_in;
class xkv_bytes_out;
class xkv_flow;
struct xkv_online_info;

// KV cache of exact sinks and recent tokens (a plain llama_kv_cache, the window) and of compressed older tokens (the
// store). Tokens enter through the window; before a micro-batch, whole chunks of the oldest leave it for the store.
class llama_kv_cache_xkv : public llama_memory_i {
public:
    // throws xkv_error
    llama_kv_cache_xkv(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                       std::shared_ptr<const xkv_sidecar> sidecar, const xkv_config & config, const xkv_layers & layers);
    ~llama_kv_cache_xkv();

    //
    // llama_memory_i: called by C, which no exception may pass. What is thrown inside becomes the refusal. Only saving and loading
    // a state throw, for llama.cpp catches there and has no other way to be told.
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) noexcept override;
    llama_memory_context_ptr init_full() noexcept override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) noexcept override;

    bool get_can_shift() const noexcept override;

    void clear(bool data) noexcept override;

    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) noexcept override;
    void seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) noexcept override;
    void seq_keep(llama_seq_id seq_id) noexcept override;
    void seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) noexcept override;
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) noexcept override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const noexcept override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const noexcept override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const noexcept override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read(llama_io_read_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    //
    // xkv specific API
    //

    // Runs f, which may throw; false when it did. With changes (read after f), the cache is broken from then on.
    template <typename F> bool guard(const char * what, const bool & changes, F && f) noexcept {
        try {
            f();
            return true;
        } catch (...) {
            fail(what, changes, xkv_caught());
            return false;
        }
    }

    // a context for micro-batches that the caller has split
    llama_memory_context_ptr init_ubatches(std::vector<llama_ubatch> ubatches);

    // says that it failed, also where there is no memory to say it
    llama_memory_context_ptr failed_context(llama_memory_status status = LLAMA_MEMORY_STATUS_FAILED_COMPUTE) noexcept;

    // makes room in the window for the micro-batch: chunks leave it; throws xkv_error
    void flush(const llama_ubatch & ubatch);

    // slots that a graph has to look at for the streams [s0, s1], padded so that graphs can be reused
    uint32_t get_n_slot(uint32_t s0, uint32_t s1) const;

    // what graphs read for the streams [s0, s1]
    xkv_view view(uint32_t s0, uint32_t s1) { return { &setup, store.get(), &tables, get_n_slot(s0, s1), s0, s1 - s0 + 1, &graph_memory }; }

    uint32_t get_stream(llama_seq_id seq_id) const { return window->get_stream(seq_id); }

    // tokens of a sequence that are exact (sinks, window) and that are compressed
    void seq_tokens(llama_seq_id seq_id, uint32_t & n_exact, uint32_t & n_stored) const;

    // how the bases of the sequence's stream followed its tokens
    xkv_online_info seq_online(llama_seq_id seq_id) const;

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // scratch, by part: bytes that do not grow with n_ctx, or are given back
    std::vector<std::pair<std::string, size_t>> scratch() const;

    // the last operation that was refused or failed; reading it clears it, unless the cache is broken
    xkv_failure take_refusal();

    llama_kv_cache * get_window() const { return window->get(); }

    // the context that the cache is of: known before its first batch, so that states can be loaded and cut
    void            attach(llama_context * ctx) noexcept;
    llama_context * context() const { return lctx; }

    bool is_broken() const { return broken; }

    // Chunks that have to be free before the sequence's tokens at [p0, p1) are removed; throws xkv_error, before anything is changed,
    // when they cannot be.
    uint32_t check_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // makes them free; changes says whether what it throws leaves the cache half changed
    void make_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool & changes);

    // an operation on positions, which a caller cannot see fail, is refused
    void refuse_positions(const char * what, const char * why) noexcept;

    // tokens that a stream holds
    uint32_t n_ctx_seq() const;

    const xkv_config config;
    const uint32_t   n_seq_max;

    const std::shared_ptr<const xkv_sidecar> sidecar;

    std::unique_ptr<xkv_store> store;

private:
    const xkv_setup setup;

    std::unique_ptr<xkv_window>  window;
    std::vector<xkv_chunk_table> tables; // per stream
    std::unique_ptr<xkv_flow>    flow;

    llama_context * lctx = nullptr;

    // where the last graph's tensors were: unused until the next one
    ggml_backend_buffer_t graph_memory = nullptr;

    xkv_failure refusal = { XKV_STATUS_OK, "" };
    bool        broken  = false; // an operation was refused that the caller could not see fail, or failed halfway

    llama_memory_context_ptr spare; // says that it failed, for when there is no memory to make one

    void refuse(const char * fmt, ...) noexcept;
    void fail(const char * what, bool changed, const xkv_failure & err) noexcept;
    void report() noexcept;

    llama_memory_context_ptr prepare(llama_batch_allocr & balloc, uint32_t n_ubatch);

    // waits for the graph in flight, which reads what is about to be written or freed: devices compute while the host goes on
    void wait();

    // removes all tokens, and what was refused
    void empty(bool data);

    size_t window_bytes() const;

    // of the window's cells through which a micro-batch passes
    size_t transit() const;

    // what belongs to tokens that were removed: text sinks, and a stream's bases with its last token
    void drop_unused();

    // after tokens were removed, see xkv_flow
    void start_over();

    // saved states (xkv-state.cpp)
    void   write_state(llama_io_write_i & io, llama_seq_id seq_id) const;
    void   read_state(llama_io_read_i & io, llama_seq_id seq_id);
    void   check_origin(xkv_bytes_in & in, llama_seq_id seq_id) const;
    void   check_members(uint32_t stream, llama_seq_id seq_id, const xkv_seq_set & seqs) const;
    void   check_size(llama_seq_id seq_id, bool alone, uint32_t stream, size_t n_token) const;
    size_t n_stay(llama_seq_id seq_id, uint32_t stream) const; // chunks that others have
    bool   is_alone(llama_seq_id seq_id) const;                // in its stream
    void   take_exact(uint32_t stream, llama_seq_id seq_id, xkv_saved_tokens & exact);

    void seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    bool check_positions(const char * what, llama_seq_id seq_id) noexcept;

    // no chunk of the sequence has tokens both inside and outside of [p0, p1) afterwards
    void part(llama_seq_id seq_id, llama_pos p0, llama_pos p1);

    // turns K of the window's tokens whose position was changed, as soon as the context is known
    void settle();

    void seq_cp_in_stream(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);
    void drop_copies(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1);
};

class llama_kv_cache_xkv_context : public llama_kv_cache_context {
public:
    // used for errors
    explicit llama_kv_cache_xkv_context(llama_memory_status status);

    // full cache
    explicit llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv);

    // batch
    llama_kv_cache_xkv_context(llama_kv_cache_xkv * xkv, std::vector<llama_ubatch> ubatches);

    bool apply() noexcept override;

    const xkv_view * as_xkv() const override { return &view; }

private:
    void place(const llama_ubatch & ubatch);

    llama_kv_cache_xkv * const xkv;

    xkv_view view = {};
};
