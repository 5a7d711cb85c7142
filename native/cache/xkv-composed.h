#pragma once

#include "cache/xkv-cache.h"

#include "llama-memory-recurrent.h"

// The memory of a model of which an xkv cache holds a part: beside it, windowed layers keep their K and V, and recurrent layers their
// state, in llama.cpp's own memories, exactly. Graphs see the contexts that llama.cpp has for the same parts.
class xkv_composed : public llama_memory_i {
public:
    // windowed or recurrent can be missing
    xkv_composed(std::unique_ptr<llama_kv_cache_xkv> attn, std::unique_ptr<llama_kv_cache> windowed,
                 std::unique_ptr<llama_memory_recurrent> recurrent, uint32_t n_swa, bool unified);

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

    // bytes of what is beside the xkv cache, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    const std::unique_ptr<llama_kv_cache_xkv> attn;

private:
    const std::unique_ptr<llama_kv_cache>         windowed;
    const std::unique_ptr<llama_memory_recurrent> recurrent;
    const uint32_t                                n_swa; // tokens that windowed layers look back
    const bool                                    unified;

    // throws xkv_error
    void settle() const;

    // whether positions can change; refuses where they cannot
    bool can_move(const char * what) noexcept;

    // whether windowed layers still have what tokens from p0 on look at
    bool has_window(llama_seq_id seq_id, llama_pos p0) const;
    bool is_forgotten(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // all parts, as far as they are there
    template <typename F> void each(F && f) const {
        for (llama_memory_i * mem :
             { (llama_memory_i *) attn.get(), (llama_memory_i *) windowed.get(), (llama_memory_i *) recurrent.get() }) {
            if (mem) {
                f(*mem);
            }
        }
    }

    // The parts beside the xkv cache, where that refused nothing: what they throw may not leave through C either.
    template <typename F> void beside(const char * what, F && f) noexcept {
        attn->guard(what, true, [&] {
            for (llama_memory_i * mem : { (llama_memory_i *) windowed.get(), (llama_memory_i *) recurrent.get() }) {
                if (mem && !attn->is_broken()) {
                    f(*mem);
                }
            }
        });
    }

    bool rm_beside(llama_memory_i * mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1) noexcept;

    std::vector<llama_ubatch> split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) const;

    llama_memory_context_ptr prepare(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all);

    // contexts of the parts as one
    llama_memory_context_ptr compose(llama_memory_context_ptr a, llama_memory_context_ptr w, llama_memory_context_ptr r,
                                     std::vector<llama_ubatch> ubatches) const;
};

// the xkv cache of a context's memory, nullptr when it has none
llama_kv_cache_xkv * xkv_find(llama_memory_i * mem);
