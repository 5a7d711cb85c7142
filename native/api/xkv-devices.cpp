// The C API of devices: which there are, what a context has on them, and those of other machines.

#include "api/xkv-guard.h"
#include "cache/xkv-composed.h"

#include "llama-context.h"

#include "ggml-backend.h"
#include "ggml-rpc.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

template <size_t N> static void xkv_copy_text(char (&dst)[N], const char * src) {
    strncpy(dst, src, N - 1);
    dst[N - 1] = 0;
}

static int32_t xkv_device_kind(ggml_backend_dev_t dev) {
    if (xkv_is_rpc(dev)) {
        return 3;
    }
    switch (ggml_backend_dev_type(dev)) {
    case GGML_BACKEND_DEVICE_TYPE_CPU:
        return 0;
    case GGML_BACKEND_DEVICE_TYPE_GPU:
        return 1;
    case GGML_BACKEND_DEVICE_TYPE_IGPU:
        return 2;
    default:
        return 4;
    }
}

int xkv_devices(xkv_device * devices, uint32_t * n_device) {
    return xkv_guard([&] {
        xkv_require(n_device, "n_device");
        const uint32_t room = *n_device;
        *n_device           = ggml_backend_dev_count();
        for (uint32_t i = 0; devices && i < std::min(room, *n_device); ++i) {
            const auto dev   = ggml_backend_dev_get(i);
            size_t     free  = 0;
            size_t     total = 0;
            ggml_backend_dev_memory(dev, &free, &total);
            devices[i] = { {}, {}, {}, free, total, xkv_device_kind(dev), xkv_has_attn(dev, 64, 64, 4, 2) };
            xkv_copy_text(devices[i].name, ggml_backend_dev_name(dev));
            xkv_copy_text(devices[i].description, ggml_backend_dev_description(dev));
            xkv_copy_text(devices[i].backend, ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)));
        }
    });
}

int xkv_context_devices(const llama_context * ctx, xkv_device_part * parts, uint32_t * n_parts) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(n_parts, "n_parts");

        std::map<std::string, xkv_device_part> found;
        for (const auto & [buft, size] : ctx->memory_breakdown()) {
            auto & part = found[ggml_backend_buft_name(buft)];
            part.weights += size.model;
            part.cache += size.context;
            part.compute += size.compute;
        }
        if (const auto * xkv = xkv_find(llama_get_memory(ctx))) {
            for (const auto & gr : xkv->store->groups()) {
                auto & part = found[ggml_backend_buft_name(xkv->store->buft(gr.layers[0]))];
                part.n_layer += gr.layers.size();
                part.n_fused += gr.pack ? gr.layers.size() : 0;
            }
        }
        const uint32_t room = *n_parts;
        *n_parts            = 0;
        for (auto & [name, part] : found) {
            if (part.weights + part.cache + part.compute == 0) {
                continue;
            }
            if (parts && *n_parts < room) {
                xkv_copy_text(part.name, name.c_str());
                parts[*n_parts] = part;
            }
            ++*n_parts;
        }
    });
}

int xkv_context_splits(llama_context * ctx, uint32_t * n_split) {
    return xkv_guard([&] {
        xkv_require(ctx, "ctx");
        xkv_require(n_split, "n_split");
        *n_split = ggml_backend_sched_get_n_splits(ctx->get_sched());
    });
}

int xkv_rpc_version(uint32_t * version) {
    return xkv_guard([&] {
        xkv_require(version, "version");
        version[0] = RPC_PROTO_MAJOR_VERSION;
        version[1] = RPC_PROTO_MINOR_VERSION;
        version[2] = RPC_PROTO_PATCH_VERSION;
    });
}

// a function of the RPC backend; throws xkv_error where the library was built without it
template <typename F> static F * xkv_rpc_function(const char * name) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    void *             f   = reg ? ggml_backend_reg_get_proc_address(reg, name) : nullptr;
    if (!f) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "the library was built without RPC; build it with -DGGML_RPC=ON");
    }
    return (F *) f;
}

int xkv_rpc_add(const char * endpoint) {
    return xkv_guard([&] {
        xkv_require(endpoint, "endpoint");
        ggml_backend_reg_t reg = xkv_rpc_function<decltype(ggml_backend_rpc_add_server)>("ggml_backend_rpc_add_server")(endpoint);
        if (!reg) {
            xkv_throw(XKV_STATUS_UNSUPPORTED, "RPC server %s has no devices", endpoint);
        }
        ggml_backend_register(reg);
    });
}

// those that are named, or else all GPUs of this machine, or else its CPU
static std::vector<ggml_backend_dev_t> xkv_devices_to_serve(const char * names) {
    std::vector<ggml_backend_dev_t> res;
    std::istringstream              list(names ? names : "");
    for (std::string name; std::getline(list, name, ',');) {
        res.push_back(ggml_backend_dev_by_name(name.c_str()));
        if (!res.back()) {
            std::string known;
            for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
                known += std::string(i ? ", " : "") + ggml_backend_dev_name(ggml_backend_dev_get(i));
            }
            xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "device %s is unknown, expected one of %s", name.c_str(), known.c_str());
        }
    }
    for (size_t i = 0; res.empty() && i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (const int32_t kind = xkv_device_kind(dev); kind == 1 || kind == 2) {
            res.push_back(dev);
        }
    }
    if (res.empty()) {
        res.push_back(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
    }
    return res;
}

int xkv_rpc_serve(const char * endpoint, const char * devices, uint32_t n_thread) {
    return xkv_guard([&] {
        xkv_require(endpoint, "endpoint");
        const auto serve = xkv_rpc_function<decltype(ggml_backend_rpc_start_server)>("ggml_backend_rpc_start_server");
        auto       list  = xkv_devices_to_serve(devices);
        serve(endpoint, nullptr, n_thread, list.size(), list.data());
        xkv_throw(XKV_STATUS_IO, "cannot serve on %s: the address is in use or is not this machine's", endpoint);
    });
}
