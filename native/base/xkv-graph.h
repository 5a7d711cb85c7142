#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include "base/xkv-memory.h"

#include <memory>
#include <utility>
#include <vector>

struct llama_context;

// A graph of the cache's own, run on the backends of a llama_context between its micro-batches. It has a scheduler and
// compute buffers of its own, so that the context's graphs stay valid and can be reused.
class xkv_graph {
public:
    // starts a new graph; the previous one is dropped
    void begin(llama_context * lctx, size_t n_node);

    // an input of type I32 or I64; data is copied when the graph runs
    ggml_tensor * input(ggml_type type, std::vector<int64_t> data);

    // an f32 input [ne0, ne1]
    ggml_tensor * input(int64_t ne0, int64_t ne1, xkv_floats data);

    void expand(ggml_tensor * t);

    // an f32 result to read after run()
    void              output(ggml_tensor * t);
    static xkv_floats read(const ggml_tensor * t);

    // allocates, sets the inputs, computes and waits; throws xkv_error
    void run();

    // most bytes of compute buffers and inputs at once
    size_t peak() const { return n_peak; }

    // frees the compute buffers: they are scratch, as a model's are
    void release();

    ggml_context * ctx() const { return context.get(); }

private:
    ggml_context_ptr       context;
    ggml_backend_sched_ptr sched;
    ggml_cgraph *          gf         = nullptr;
    size_t                 n_node_max = 0;
    size_t                 n_peak     = 0;

    std::vector<std::pair<ggml_tensor *, std::vector<int64_t>>> inputs;
    std::vector<std::pair<ggml_tensor *, xkv_floats>>           inputs_f32;
};
