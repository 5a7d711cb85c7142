#pragma once

#include "base/xkv-bytes.h"
#include "base/xkv-layers.h"
#include "window/xkv-chunks.h"

#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

// a token of a saved state
struct xkv_saved_token {
    uint32_t          cell;
    llama_pos         pos;
    bool              sink;
    llama_kv_cell_ext ext;
    xkv_seq_set       seqs;
};

// and their rows in the bytes of the state: K and V of each layer
struct xkv_saved_tokens {
    struct row_list {
        ggml_type       type;
        size_t          n_byte; // of a row
        const uint8_t * data;
    };

    std::vector<xkv_saved_token> tokens;
    std::vector<row_list>        rows;
    uint32_t                     head = 0; // cell from which room is looked for
};

// Sinks and recent tokens, exact: a plain llama_kv_cache. Nothing else knows how that keeps its cells and tensors.
class xkv_window {
public:
    xkv_window(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams, const xkv_layers & layers,
               uint32_t n_cell);

    llama_kv_cache * get() const { return kv.get(); }

    uint32_t size() const { return kv->get_size(); } // cells of a stream
    uint32_t get_stream(llama_seq_id seq_id) const { return kv->get_stream(seq_id); }

    // storage of a layer: K [n_embd_k, size], V [n_embd_v, size]
    ggml_tensor * k(uint32_t il, uint32_t stream) const;
    ggml_tensor * v(uint32_t il, uint32_t stream) const;

    uint32_t n_used(uint32_t stream) const { return cells(stream).get_used(); }
    uint32_t n_token(llama_seq_id seq_id) const { return kv->get_cells(seq_id).seq_pos_get(seq_id).size(); }

    // of a sequence, by ascending positions
    std::vector<xkv_token> tokens(llama_seq_id seq_id) const;

    // cells that are empty, or will be once the sequence's tokens in [p0, p1) are removed
    uint32_t n_free(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // the first empty cells; throws xkv_error when there are fewer
    std::vector<uint32_t> free_cells(uint32_t stream, size_t n) const;

    void put(uint32_t stream, uint32_t cell, llama_pos pos, llama_seq_id seq_id);
    void share(uint32_t stream, const std::vector<uint32_t> & list, const xkv_seq_set & seqs); // tokens belong to all of these
    void remove(uint32_t stream, const std::vector<uint32_t> & list);

    // llama.cpp's own would turn K the other way (llama_kv_cells::pos_div)
    void seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d);

    // cells of a stream whose position was changed since the last call, and by how much: their K has to be turned
    bool                                        has_shift() const { return kv->get_has_shift(); }
    std::vector<std::pair<uint32_t, llama_pos>> take_shift(uint32_t stream);

    // attention sinks in the text, which stay while their cell is used
    void     set_sink(uint32_t stream, uint32_t cell) { sinks[stream][cell] = true; }
    uint32_t n_sink(llama_seq_id seq_id) const;
    void     drop_sinks();

    // all of a sequence, into the stream of another one
    void copy(llama_context * lctx, llama_seq_id src, llama_seq_id dst);

    // for saved states (xkv-window-image.cpp): tokens of all sequences or of one; parse throws xkv_error
    void             save(uint32_t stream, llama_seq_id seq_id, xkv_bytes_out & out) const;
    xkv_saved_tokens parse(xkv_bytes_in & in, uint32_t n_seq_max) const;

    // Those that are listed, for their sequences or for another one: into the cells that they had, where these are empty, so that what
    // follows is placed and summed in the same order; else into the first empty ones.
    void load(uint32_t stream, const xkv_saved_tokens & saved, const std::vector<uint32_t> & which, llama_seq_id seq_id);

private:
    std::unique_ptr<llama_kv_cache> kv;

    std::vector<std::vector<bool>> sinks; // per stream and cell

    llama_kv_cells & cells(uint32_t stream) const;

    bool has_places(uint32_t stream, const xkv_saved_tokens & saved, const std::vector<uint32_t> & which) const;

    // f(layer, K or V) for all that is kept
    template <typename F> void each_tensor(uint32_t stream, F && f) const;
};
