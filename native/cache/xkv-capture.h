#pragma once

#include "base/xkv-graph.h"

#include "llama.h"

#include <cstdint>
#include <utility>
#include <vector>

class llama_kv_cache;

// Calibration: sums over tokens of x and x x^T per group of layers, x being the chunk-frame K (or the V) of the group's
// layers side by side. Memory does not grow with the number of tokens. And x itself, out of the cache and back into it, to
// try what a loss costs.
struct xkv_capture {
    // throws xkv_error
    xkv_capture(llama_context * ctx, std::vector<std::vector<uint32_t>> layers, uint32_t frame, uint32_t n_sink);

    // adds what a sequence holds now; throws xkv_error
    void add(llama_seq_id seq_id);

    // does not need the context any more; throws xkv_error
    void read(uint32_t group, int kind, double * gram, double * sum, uint64_t * n_tokens) const;

    // frees the sums of a group, which read as zeros of no tokens from now on; throws xkv_error
    void drop(uint32_t group, int kind);

    // x [dim, n] of a sequence's tokens at pos .. pos + n - 1, all of which have to be there; throws xkv_error
    void get(llama_seq_id seq_id, uint32_t group, int kind, llama_pos pos, uint32_t n, float * x);
    void put(llama_seq_id seq_id, uint32_t group, int kind, llama_pos pos, uint32_t n, const float * x);

private:
    struct sums {
        uint32_t            dim;
        std::vector<float>  gram; // rows of the lower triangle, of blocks of tokens: few enough terms for f32
        std::vector<double> sum;
    };

    llama_context * const ctx;
    llama_kv_cache *      cache;
    const uint32_t        frame;
    const uint32_t        n_sink;

    const std::vector<std::vector<uint32_t>> layers; // of the model, per group

    xkv_graph         graph;
    std::vector<sums> groups[2]; // K, V
    uint64_t          n_tokens = 0;

    void check(uint32_t group, int kind) const;

    // cells of tokens, and their chunks' first positions; throws xkv_error where one is missing
    std::pair<std::vector<int64_t>, std::vector<int64_t>> find(llama_seq_id seq_id, llama_pos pos, uint32_t n) const;

    void add_block(uint32_t stream, const std::vector<int64_t> & cells, const std::vector<int64_t> & origin);

    // one layer of the cache [n_embd, size]
    ggml_tensor * rows(uint32_t il, int kind, uint32_t stream);

    // [n_embd, n_token] f32 of one layer
    ggml_tensor * layer_k(uint32_t il, uint32_t stream, ggml_tensor * cells, ggml_tensor * origin);
    ggml_tensor * layer_v(uint32_t il, uint32_t stream, ggml_tensor * cells);
};
