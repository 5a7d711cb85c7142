#pragma once

#include "xkv-sidecar.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

// Checked copy of xkv_params. Sizes are in tokens.
struct xkv_config {
    uint32_t  n_sink;
    uint32_t  n_window;
    uint32_t  n_block;
    uint32_t  n_absorb;
    ggml_type type_coef[2]; // K, V
    ggml_type type_basis;

    std::vector<uint32_t> rank[2]; // per group
};

// The compressed part of the cache: coefficients per group and token, bases and means per layer. Tensors only, the
// bookkeeping of chunks is the cache's.
//
// Coefficients are laid out so that a page table can be put over them later: a slot is a token, a chunk is n_chunk
// consecutive slots, and both tensors address it by its first slot.
//   K: one row per slot, so that a chunk is contiguous and a query meets it as one matrix
//   V: one row per direction, so that a quantization block is one direction over 32 tokens of one chunk
class xkv_store {
public:
    struct group {
        uint32_t first;
        uint32_t count;
        uint32_t rank[2]; // padded to whole quantization blocks; directions beyond the plan are zero

        ggml_tensor * coef_k; // [rank_k, n_slot, n_stream]
        ggml_tensor * coef_v; // [n_slot, rank_v, n_stream]

        std::vector<ggml_tensor *> coef_k_stream; // views of one stream
        std::vector<ggml_tensor *> coef_v_stream;
    };

    struct layer {
        uint32_t ig;

        ggml_tensor * basis_k; // [n_embd_k, rank_k + n_mean_row]: row rank_k is the mean, the others pad
        ggml_tensor * basis_v; // [rank_v, n_embd_v]
        ggml_tensor * mean_k;  // [n_embd_k] f32
        ggml_tensor * mean_v;  // [n_embd_v] f32
        ggml_tensor * mean_o;  // [n_embd_head_v*n_head] f32: what the mean of V adds to the attention output
    };

    static const uint32_t n_mean_row = 4;

    // throws xkv_error
    xkv_store(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config, uint32_t n_slot, uint32_t n_stream,
              bool offload);

    void clear();

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // [begin, end) over the buffers of all parts
    const std::vector<ggml_backend_buffer_ptr> & buffers() const { return bufs; }

    const uint32_t n_chunk;
    const uint32_t n_slot;
    const uint32_t n_stream;

    std::vector<group> groups;
    std::vector<layer> layers;

private:
    enum part { PART_COEF_K, PART_COEF_V, PART_BASES, PART_COUNT };

    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;
    std::vector<part>                    buf_parts;

    void fill_bases(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config);
};
