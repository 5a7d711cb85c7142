#pragma once

#include "xkv-sidecar.h"

#include "ggml-cpp.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

struct llama_model;

// Checked copy of xkv_params. Sizes are in tokens.
struct xkv_config {
    struct segment {
        uint32_t  rank;
        ggml_type type;
        ggml_type type_basis;
    };

    uint32_t  n_sink;
    uint32_t  n_text_sink;
    uint32_t  n_window;
    uint32_t  n_absorb;
    bool      online;
    uint32_t  n_prior;
    bool      fused;

    std::vector<std::vector<segment>> segments[2]; // per kind and group, by descending variance
};

// The compressed part of the cache: coefficients per group and token, bases and means per layer. Tensors only, the
// bookkeeping of chunks is the cache's.
//
// Coefficients are laid out so that a page table can be put over them later: a slot is a token, a chunk is n_chunk
// consecutive slots, and every tensor addresses it by its first slot. The directions of a group and kind are ordered by
// variance and split into segments, one tensor and type each.
//   K: one row per slot, so that a chunk is contiguous and a query meets it as one matrix
//   V: one row per direction, so that a quantization block is one direction over the tokens of one chunk
class xkv_store {
public:
    using kind = xkv_sidecar::kind;

    struct segment {
        ggml_type type;
        ggml_type type_basis;
        uint32_t  first; // direction
        uint32_t  rank;  // padded to whole blocks; directions beyond the plan are zero

        ggml_tensor * coef; // K [rank, n_slot, n_stream], V [n_slot, rank, n_stream]
    };

    struct group {
        uint32_t first;
        uint32_t count;
        uint32_t dim [2]; // numbers per token of all layers
        uint32_t rank[2]; // of all segments

        std::vector<segment> segments[2];
    };

    struct layer {
        uint32_t ig;
        uint32_t off[2]; // the layer's first number among its group's

        ggml_tensor * mean_k; // [n_embd_k] f32
        ggml_tensor * mean_v; // [n_embd_v] f32
        ggml_tensor * mean_o; // [n_embd_head_v*n_head] f32: what the mean of V adds to the attention output
    };

    // throws xkv_error
    xkv_store(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config, uint32_t n_slot, uint32_t n_stream,
              bool offload);

    // basis of a layer and segment for a stream: K [n_embd_k, rank], V [rank, n_embd_v]
    ggml_tensor * basis(kind kd, uint32_t il, uint32_t is, uint32_t stream) const;

    // true when none of the streams has bases of its own
    bool shares_bases(uint32_t s0, uint32_t n) const;

    // grows whenever a stream gets or loses bases of its own, so that graphs that hold them are rebuilt
    uint32_t n_change() const { return n_basis_change; }

    // directions of a group as rows [rank, dim]
    std::vector<float> get_basis(kind kd, uint32_t ig, uint32_t stream) const;
    void               set_basis(kind kd, uint32_t ig, uint32_t stream, const std::vector<float> & rows);

    // before set_basis: bases of the stream's own where several streams share the calibrated ones; throws xkv_error
    void own_bases(uint32_t stream);

    // back to the calibrated bases; throws xkv_error
    void reset_bases(uint32_t stream);

    // coefficients of a chunk, [n_chunk, rank]: one row of all directions per token
    std::vector<float> get_coef(kind kd, uint32_t ig, uint32_t stream, uint32_t ic) const;
    void               set_coef(kind kd, uint32_t ig, uint32_t stream, uint32_t ic, const float * coef);

    void copy_stream(uint32_t src, uint32_t dst);

    void clear();

    // bytes allocated, by part
    std::vector<std::pair<std::string, size_t>> parts() const;

    // by buffer type
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> buffers() const;

    const uint32_t n_chunk;
    const uint32_t n_slot;
    const uint32_t n_stream;

    std::vector<group> groups;
    std::vector<layer> layers;

private:
    enum part { PART_COEF_K, PART_COEF_V, PART_BASES, PART_MEANS, PART_COUNT };

    // tensors of one part and their buffers
    struct pool {
        part                                 what;
        std::vector<ggml_context_ptr>        ctxs;
        std::vector<ggml_backend_buffer_ptr> bufs;
    };

    struct basis_set {
        pool mem;
        bool changed = false;

        std::vector<std::vector<ggml_tensor *>> basis[2]; // per layer and segment

    };

    const llama_model & model;
    const xkv_sidecar & sidecar;
    const bool          offload;

    std::vector<pool> pools; // coefficients, means

    std::unique_ptr<basis_set>              calibrated;
    std::vector<std::unique_ptr<basis_set>> own; // per stream, empty while the calibrated ones are used

    uint32_t n_basis_change = 0;

    ggml_backend_buffer_type_t buft(uint32_t il) const;
    ggml_backend_dev_t         device(uint32_t il) const;

    // tensors that make creates, allocated and zeroed; ctx_of gives the context for a layer's buffer type
    using ctx_of_t = std::function<ggml_context *(uint32_t il)>;

    pool make_pool(part what, size_t n_tensors, const std::function<void(const ctx_of_t & ctx_of)> & make) const;

    std::unique_ptr<basis_set> make_bases() const;

    const basis_set & bases_of(uint32_t stream) const { return own[stream] ? *own[stream] : *calibrated; }

    void write_basis(basis_set & set, kind kd, uint32_t ig, const std::vector<float> & rows) const;
    void fill_bases(basis_set & set) const;
    void copy_bases(const basis_set & src, basis_set & dst) const;
    void fill_means();
};

// With a basis as it is stored: coefficients [rank, n] of x [n_embd, n], and back.
ggml_tensor * xkv_to_coef  (ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * x);
ggml_tensor * xkv_from_coef(ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * coef);
