#pragma once

#include "store/xkv-store.h"

#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <bitset>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_model;

class xkv_flush;
struct xkv_flush_job;
class xkv_online_bases;
struct xkv_online_info;

// Tokens of one set of sequences whose positions lie within n_chunk of each other, kept as coefficients in the chunk's
// first n slots. Positions are missing where tokens stayed exact or were removed.
struct xkv_chunk {
    using seq_set_t = std::bitset<LLAMA_MAX_SEQ>;

    llama_pos pos = -1; // position of the first token: the origin of the chunk's RoPE frame
    uint32_t  n   = 0;  // tokens; 0: the chunk is free
    seq_set_t seqs;

    std::vector<uint16_t> offsets; // of the tokens' positions from pos, ascending [n]

    llama_pos end() const { return n > 0 ? pos + offsets.back() + 1 : pos; }
};

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

    const std::vector<xkv_chunk> & get_chunks(uint32_t stream) const { return chunks[stream]; }

    uint32_t get_stream(llama_seq_id seq_id) const { return window->get_stream(seq_id); }

    // tokens of a sequence that are exact (sinks, window) and that are compressed
    void seq_tokens(llama_seq_id seq_id, uint32_t & n_exact, uint32_t & n_stored) const;

    // how the bases of the sequence's stream followed its tokens
    xkv_online_info seq_online(llama_seq_id seq_id) const;

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // the last operation that was refused; reading it clears it
    std::string take_refusal();

    llama_kv_cache * get_window() const { return window.get(); }

    // storage of a layer in the window: K [n_embd_k, size], V [n_embd_v, size]
    ggml_tensor * window_k(uint32_t il, uint32_t stream) const;
    ggml_tensor * window_v(uint32_t il, uint32_t stream) const;

    const llama_model   & model;
    const llama_cparams & cparams;
    const xkv_config      config;
    const uint32_t        n_seq_max;

    const std::shared_ptr<const xkv_sidecar> sidecar;

    std::unique_ptr<xkv_store> store;

private:
    std::unique_ptr<llama_kv_cache> window;
    std::unique_ptr<xkv_flush>      flusher;
    std::unique_ptr<xkv_online_bases>     online; // empty while bases stay as calibrated

    std::vector<std::vector<xkv_chunk>> chunks; // per stream and chunk index

    std::vector<std::vector<bool>> text_sinks; // per stream and cell of the window: stays there

    llama_context * lctx = nullptr;

    std::string refusal;
    bool        broken = false; // an operation was refused that the caller could not see fail

    void refuse(const char * fmt, ...);

    llama_kv_cells & cells(uint32_t stream) const;

    // what belongs to tokens that were removed: text sinks, and a stream's bases with its last token
    void drop_unused();

    // oldest tokens of a sequence leave the window
    void flush_seq(llama_seq_id seq_id);

    // takes tokens that have to stay exact out of the jobs, and jobs that nothing is left of
    void keep_text_sinks(llama_seq_id seq_id, std::vector<xkv_flush_job> & jobs);

    // gives the jobs free chunks; moves the store to the stage that has them
    void find_chunks(uint32_t stream, std::vector<xkv_flush_job> & jobs);
    void enter_stage(uint32_t stream, uint32_t stage, const std::vector<uint32_t> & used, const std::vector<xkv_flush_job> & jobs);

    // an empty store in a stage, with calibrated bases
    void restart(uint32_t stage);

    // exact copies of the tokens of a chunk at positions inside [p0, p1) go back into the window for one sequence
    void restore(uint32_t stream, uint32_t ic, llama_seq_id seq_id, llama_pos p0, llama_pos p1);

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

    const llama_kv_cache_xkv_context * as_xkv() const override { return this; }

    uint32_t get_n_slot()   const { return n_slot; }
    uint32_t get_stream_0() const { return sinfos[i_cur].s0; }
    uint32_t get_n_stream() const { return sinfos[i_cur].s1 - sinfos[i_cur].s0 + 1; }

    llama_kv_cache_xkv * const xkv;

private:
    uint32_t n_slot = 0;
};
