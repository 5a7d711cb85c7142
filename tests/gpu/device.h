// A device of ggml by name, and instances of the op on it.

#pragma once

#include "ops/xkv_attn/test/case.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>
#include <string>

// "cpu", "gpu" (the first one), or ggml's own name, such as CUDA1; ends the process where there is none
static inline ggml_backend_dev_t xkv_find_device(const std::string & name) {
    ggml_backend_dev_t dev = name == "cpu" ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU) :
                             name == "gpu" ? ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU) :
                                             ggml_backend_dev_by_name(name.c_str());
    if (!dev) {
        fprintf(stderr, "no device %s: this build of ggml knows %zu, and none is it\n", name.c_str(), ggml_backend_dev_count());
        exit(2);
    }
    return dev;
}

static inline bool xkv_is_cpu(ggml_backend_dev_t dev) {
    return ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

static inline ggml_backend_ptr xkv_open_device(ggml_backend_dev_t dev, int n_thread) {
    ggml_backend_ptr backend(ggml_backend_dev_init(dev, nullptr));
    if (!backend) {
        fprintf(stderr, "device %s cannot be opened\n", ggml_backend_dev_name(dev));
        exit(2);
    }
    if (xkv_is_cpu(dev)) {
        ggml_backend_cpu_set_n_threads(backend.get(), n_thread);
    }
    return backend;
}

// Tensors without memory, until alloc() gives them a buffer of the device.
struct xkv_device_graph {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_cgraph *           gf;

    xkv_device_graph() : ctx(ggml_init({ (size_t) 4 << 20, nullptr, true })), gf(ggml_new_graph(ctx.get())) {}

    bool alloc(ggml_backend_t backend) {
        buf.reset(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
        return (bool) buf;
    }
    // a tensor of the same type, sizes and op, whose sources are those that are given
    ggml_tensor * op_like(const ggml_tensor * t, const std::vector<ggml_tensor *> & src) {
        ggml_tensor * res = ggml_dup_tensor(ctx.get(), t);
        res->op           = t->op;
        memcpy(res->op_params, t->op_params, sizeof(t->op_params));
        for (size_t i = 0; i < src.size(); ++i) {
            res->src[i] = src[i];
        }
        ggml_build_forward_expand(gf, res);
        return res;
    }
    std::vector<ggml_tensor *> sources_like(const ggml_tensor * t) {
        std::vector<ggml_tensor *> res;
        for (ggml_tensor * src : t->src) {
            res.push_back(src ? ggml_dup_tensor(ctx.get(), src) : nullptr);
        }
        return res;
    }
};
