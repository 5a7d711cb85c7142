#pragma once

#include "base/xkv-graph.h"
#include "flow/xkv-select.h"
#include "store/xkv-config.h"
#include "store/xkv-store.h"
#include "window/xkv-window.h"

#include "llama.h"

#include <cstdint>
#include <vector>

// Moves tokens between window and store: projection onto the bases, and back.
class xkv_flush {
public:
    using job = xkv_flush_job;

    xkv_flush(const xkv_setup & setup, xkv_store & store, const xkv_window & window) : setup(setup), store(store), window(window) {}

    // writes the coefficients of the jobs' tokens into their chunks; throws xkv_error
    void compress(llama_context * lctx, uint32_t stream, const std::vector<job> & jobs);

    // most bytes of its graphs
    size_t peak() const { return graph.peak(); }

    // writes K and V of the tokens in slots of a chunk into cells of the window; throws xkv_error
    void restore(llama_context * lctx, uint32_t stream, uint32_t ic, llama_pos pos, const std::vector<uint32_t> & slots,
                 const std::vector<uint32_t> & cells);

    // turns K of the tokens in cells of the window by so many positions; throws xkv_error
    void turn(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & cells, const std::vector<llama_pos> & by);

    // Coefficients of K of a group's tokens [n, rank], each turned by so many positions within the frame that it is seen in: exact
    // as far as the bases hold what is turned. Throws xkv_error.
    xkv_floats turned(llama_context * lctx, uint32_t ig, uint32_t stream, const xkv_floats & coef, const std::vector<llama_pos> & by);

    void release() { graph.release(); }

    // Energy of V of the tokens in cells over its mean, in the layer where that is least [cells.size()]. Attention sinks have
    // values near zero (value-state drains, arXiv 2410.13835, section 2).
    std::vector<float> value_drain(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & cells);

    // nodes in a graph of this class for K or V of a group of layers: the tokens of cells, centred and K in the frames of
    // their chunks, f32 [dim, n]; cells and origin (minus the chunks' positions) are inputs
    ggml_tensor * build_group(xkv_graph & graph, xkv_store::kind kd, uint32_t ig, uint32_t stream, ggml_tensor * cells,
                              ggml_tensor * origin) const;

private:
    const xkv_setup    setup;
    xkv_store &        store;
    const xkv_window & window;

    xkv_graph graph;

    // K of a layer [n_embd, n] turned
    ggml_tensor * build_turn(ggml_context * ctx, uint32_t il, ggml_tensor * k, ggml_tensor * by) const;

    // K or V of a layer, centred, from coefficients [rank, n]
    ggml_tensor * build_decoded(llama_context * lctx, xkv_store::kind kd, uint32_t il, uint32_t stream, ggml_tensor * coef);

    void compress_block(llama_context * lctx, uint32_t stream, const job * jobs, size_t n_job);

    // coefficients of a group's tokens [cells.size(), rank]: as they are in a plain store, else projected onto the bases
    xkv_floats read_group(llama_context * lctx, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<int64_t> & cells,
                          const std::vector<int64_t> & origin);
    xkv_floats project_group(llama_context * lctx, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<int64_t> & cells,
                             const std::vector<int64_t> & origin);

    // numbers of one layer [n_embd, n]
    ggml_tensor * build_layer(ggml_context * ctx, xkv_store::kind kd, uint32_t il, uint32_t stream, ggml_tensor * cells,
                              ggml_tensor * origin) const;
};
