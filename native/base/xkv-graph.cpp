#include "base/xkv-graph.h"

#include "base/xkv-error.h"
#include "base/xkv-memory.h"

#include "llama-context.h"

#include "ggml.h"

#include <algorithm>

// of ggml-backend.cpp
static const size_t XKV_MAX_SPLIT_INPUTS = 30;

void xkv_graph::begin(llama_context * lctx, size_t n_node) {
    inputs.clear();
    inputs_f32.clear();

    // the scheduler has room for a split at every node
    const size_t n_byte = 2 * n_node * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_node, false);
    xkv_ask(n_byte + 2 * n_node * XKV_MAX_SPLIT_INPUTS * sizeof(ggml_tensor) + 1024 * 1024);

    context.reset(ggml_init({
        /*.mem_size   =*/n_byte,
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    }));
    gf = ggml_new_graph_custom(context.get(), n_node, false);

    if (!sched || n_node > n_node_max) {
        ggml_backend_sched_t main = lctx->get_sched();

        std::vector<ggml_backend_t>             backends;
        std::vector<ggml_backend_buffer_type_t> bufts;
        for (int i = 0; i < ggml_backend_sched_get_n_backends(main); ++i) {
            backends.push_back(ggml_backend_sched_get_backend(main, i));
            bufts.push_back(ggml_backend_sched_get_buffer_type(main, backends.back()));
        }
        sched.reset(ggml_backend_sched_new(backends.data(), bufts.data(), backends.size(), n_node, false, false));
        n_node_max = n_node;
    }
}

ggml_tensor * xkv_graph::input(ggml_type type, std::vector<int64_t> data) {
    ggml_tensor * t = ggml_new_tensor_1d(context.get(), type, data.size());
    ggml_set_input(t);
    inputs.emplace_back(t, std::move(data));
    return t;
}

ggml_tensor * xkv_graph::input(int64_t ne0, int64_t ne1, xkv_floats data) {
    ggml_tensor * t = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, ne0, ne1);
    GGML_ASSERT((int64_t) data.size() == ne0 * ne1);
    ggml_set_input(t);
    inputs_f32.emplace_back(t, std::move(data));
    return t;
}

void xkv_graph::output(ggml_tensor * t) {
    ggml_set_output(t);
    expand(t);
}

xkv_floats xkv_graph::read(const ggml_tensor * t) {
    xkv_floats res(ggml_nelements(t));
    ggml_backend_tensor_get(t, res.data(), 0, ggml_nbytes(t));
    return res;
}

void xkv_graph::expand(ggml_tensor * t) {
    ggml_build_forward_expand(gf, t);
}

void xkv_graph::run() {
    ggml_backend_sched_reset(sched.get());
    if (!ggml_backend_sched_alloc_graph(sched.get(), gf)) {
        xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the compute buffer of an xkv graph");
    }
    size_t n_byte = 0;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched.get()); ++i) {
        n_byte += ggml_backend_sched_get_buffer_size(sched.get(), ggml_backend_sched_get_backend(sched.get(), i));
    }
    for (const auto & [t, data] : inputs_f32) {
        n_byte += data.size() * sizeof(float);
    }
    n_peak = std::max(n_peak, n_byte);

    for (const auto & [t, data] : inputs) {
        if (!t->buffer) {
            continue; // not used by this model, e.g. positions without RoPE
        }
        if (t->type == GGML_TYPE_I64) {
            ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        } else {
            const std::vector<int32_t> narrow(data.begin(), data.end());
            ggml_backend_tensor_set(t, narrow.data(), 0, ggml_nbytes(t));
        }
    }
    for (const auto & [t, data] : inputs_f32) {
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
    }
    const auto status = ggml_backend_sched_graph_compute(sched.get(), gf);
    ggml_backend_sched_synchronize(sched.get());
    if (status != GGML_STATUS_SUCCESS) {
        xkv_throw(XKV_STATUS_INTERNAL, "computing an xkv graph failed with %s", ggml_status_to_string(status));
    }
}

void xkv_graph::release() {
    inputs.clear();
    inputs_f32.clear();
    context.reset();
    sched.reset();
    xkv_trim();
}
