#include "format/xkv-sidecar.h"

#include "base/xkv-error.h"

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>

#include <sys/stat.h>

static const uint32_t XKV_FORMAT_VERSION = 5;

static int64_t xkv_find_key(const xkv_sidecar & sc, const gguf_context * ctx, const char * key, gguf_type type) {
    const int64_t id = gguf_find_key(ctx, key);
    if (id < 0) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key %s is missing; run xkv-gguf convert again", sc.path.c_str(), key);
    }
    if (gguf_get_kv_type(ctx, id) != type) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key %s has type %s, expected %s", sc.path.c_str(), key,
                  gguf_type_name(gguf_get_kv_type(ctx, id)), gguf_type_name(type));
    }
    return id;
}

static uint32_t xkv_get_u32(const xkv_sidecar & sc, const gguf_context * ctx, const char * key) {
    return gguf_get_val_u32(ctx, xkv_find_key(sc, ctx, key, GGUF_TYPE_UINT32));
}

static std::vector<uint32_t> xkv_get_u32s(const xkv_sidecar & sc, const gguf_context * ctx, const char * key) {
    const int64_t id = xkv_find_key(sc, ctx, key, GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(ctx, id) != GGUF_TYPE_UINT32) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key %s holds %s, expected u32", sc.path.c_str(), key,
                  gguf_type_name(gguf_get_arr_type(ctx, id)));
    }
    const uint32_t * data = (const uint32_t *) gguf_get_arr_data(ctx, id);
    return std::vector<uint32_t>(data, data + gguf_get_arr_n(ctx, id));
}

static xkv_floats xkv_get_scales(const xkv_sidecar & sc, const gguf_context * ctx, const char * key, size_t n_layer) {
    const int64_t id = xkv_find_key(sc, ctx, key, GGUF_TYPE_ARRAY);
    if (gguf_get_arr_type(ctx, id) != GGUF_TYPE_FLOAT32 || gguf_get_arr_n(ctx, id) != n_layer) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key %s holds %zu of %s, expected %zu of f32", sc.path.c_str(), key,
                  (size_t) gguf_get_arr_n(ctx, id), gguf_type_name(gguf_get_arr_type(ctx, id)), n_layer);
    }
    const float * data = (const float *) gguf_get_arr_data(ctx, id);
    for (size_t il = 0; il < n_layer; ++il) {
        if (!(data[il] > 0.0f) || !std::isfinite(data[il])) {
            xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key %s is %g for layer %zu, expected a finite number above 0", sc.path.c_str(), key,
                      data[il], il);
        }
    }
    return xkv_floats(data, data + n_layer);
}

std::vector<std::vector<uint32_t>> xkv_layer_lists(const uint32_t * layers, const uint32_t * count, uint32_t n_group) {
    std::vector<std::vector<uint32_t>> res;
    for (uint32_t g = 0; g < n_group; ++g) {
        res.emplace_back(layers, layers + count[g]);
        layers += count[g];
    }
    return res;
}

void xkv_sidecar::fill_groups(const std::string & what) {
    const size_t n_layer = std::min(n_embd[K].size(), n_embd[V].size());

    std::vector<bool> seen(n_layer, false);
    for (size_t g = 0; g < groups.size(); ++g) {
        auto & gr = groups[g];
        if (gr.layers.empty()) {
            xkv_throw(XKV_STATUS_FORMAT, "%s: group %zu has no layers, expected at least one", what.c_str(), g);
        }
        uint64_t dim[2] = { 0, 0 };
        for (size_t i = 0; i < gr.layers.size(); ++i) {
            const uint32_t il = gr.layers[i];
            if (il >= n_layer || seen[il] || (i > 0 && il < gr.layers[i - 1])) {
                xkv_throw(XKV_STATUS_FORMAT, "%s: group %zu has layer %u, expected ascending ones below %zu, each in one group",
                          what.c_str(), g, il, n_layer);
            }
            if (n_embd[K][il] == 0) {
                xkv_throw(XKV_STATUS_FORMAT, "%s: group %zu has layer %u, which has no K", what.c_str(), g, il);
            }
            if ((n_embd[V][il] == 0) != (n_embd[V][gr.layers[0]] == 0)) {
                xkv_throw(XKV_STATUS_FORMAT, "%s: group %zu has layers with V and without, expected one of both", what.c_str(), g);
            }
            seen[il] = true;
            dim[K] += n_embd[K][il];
            dim[V] += n_embd[V][il];
        }
        if (std::max(dim[K], dim[V]) > UINT32_MAX) {
            xkv_throw(XKV_STATUS_FORMAT, "%s: group %zu has %llu numbers of K and %llu of V, expected below 2^32", what.c_str(), g,
                      (unsigned long long) dim[K], (unsigned long long) dim[V]);
        }
        gr.dim[K] = dim[K];
        gr.dim[V] = dim[V];
    }
}

xkv_sidecar::xkv_sidecar(const std::vector<std::vector<uint32_t>> & layers, uint32_t frame) : frame(frame) {
    for (const auto & list : layers) {
        groups.push_back({ list, { 0, 0 } });
    }
}

void xkv_sidecar::set_embd(std::vector<uint32_t> n_embd_k, std::vector<uint32_t> n_embd_v) {
    n_embd[K] = std::move(n_embd_k);
    n_embd[V] = std::move(n_embd_v);
    for (int kd = K; kd <= V; ++kd) {
        scale[kd].assign(n_embd[kd].size(), 1.0f);
    }
    fill_groups("groups without calibration");
}

xkv_sidecar::xkv_sidecar(const std::string & path) : path(path) {
    if (FILE * f = fopen(path.c_str(), "rb")) {
        file.reset(f, fclose);
    } else {
        xkv_throw(XKV_STATUS_IO, "sidecar %s: cannot be opened", path.c_str());
    }
    opened              = look();
    const uint64_t size = opened.n_byte;

    gguf_context_ptr ctx(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/nullptr }));
    if (!ctx) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: not a readable GGUF file", path.c_str());
    }
    const int64_t id_arch = xkv_find_key(*this, ctx.get(), "general.architecture", GGUF_TYPE_STRING);
    if (strcmp(gguf_get_val_str(ctx.get(), id_arch), "xkv") != 0) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: general.architecture is %s, expected xkv; pass the file that xkv-gguf convert wrote",
                  path.c_str(), gguf_get_val_str(ctx.get(), id_arch));
    }
    const uint32_t version = xkv_get_u32(*this, ctx.get(), "xkv.format_version");
    if (version != XKV_FORMAT_VERSION) {
        xkv_throw(XKV_STATUS_VERSION, "sidecar %s: format version %u, expected %u; %s", path.c_str(), version, XKV_FORMAT_VERSION,
                  version > XKV_FORMAT_VERSION ? "upgrade xkv-gguf" : "run xkv-gguf convert again");
    }

    frame     = xkv_get_u32(*this, ctx.get(), "xkv.frame");
    n_embd[K] = xkv_get_u32s(*this, ctx.get(), "xkv.embd_k");
    n_embd[V] = xkv_get_u32s(*this, ctx.get(), "xkv.embd_v");
    scale[K]  = xkv_get_scales(*this, ctx.get(), "xkv.scale_k", n_embd[K].size());
    scale[V]  = xkv_get_scales(*this, ctx.get(), "xkv.scale_v", n_embd[V].size());

    if (frame != 32 && frame != 64 && frame != 128 && frame != 256) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: frame is %u tokens, expected 32, 64, 128 or 256", path.c_str(), frame);
    }

    const auto     count  = xkv_get_u32s(*this, ctx.get(), "xkv.group.count");
    const auto     layers = xkv_get_u32s(*this, ctx.get(), "xkv.group.layers");
    const uint64_t n_all  = std::accumulate(count.begin(), count.end(), (uint64_t) 0);
    if (count.empty()) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key xkv.group.count is empty, expected at least one group", path.c_str());
    }
    if (n_all != layers.size()) {
        xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: key xkv.group.layers lists %zu layers, expected %llu, the sum of xkv.group.count",
                  path.c_str(), layers.size(), (unsigned long long) n_all);
    }
    auto next = layers.begin();
    for (uint32_t n : count) {
        groups.push_back({ std::vector<uint32_t>(next, next + n), { 0, 0 } });
        next += n;
    }
    fill_groups("sidecar " + path);

    // n_row 0: a basis, of up to dim directions
    const auto find = [&](size_t g, int kd, const char * what, uint64_t n_row) {
        char name[64];
        snprintf(name, sizeof(name), "group.%zu.%c.%s", g, kd == K ? 'k' : 'v', what);

        const int64_t id = gguf_find_tensor(ctx.get(), name);
        if (id < 0) {
            xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: tensor %s is missing", path.c_str(), name);
        }
        const bool      basis = n_row == 0;
        const uint64_t  dim   = groups[g].dim[kd];
        const ggml_type type  = gguf_get_tensor_type(ctx.get(), id);
        if (type != GGML_TYPE_F32 && !(basis && type == GGML_TYPE_F16)) {
            xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: tensor %s has type %s, expected f32%s", path.c_str(), name, ggml_type_name(type),
                      basis ? " or f16" : "");
        }
        const uint64_t n = gguf_get_tensor_size(ctx.get(), id) / ggml_type_size(type);
        if (basis ? n == 0 || n % dim != 0 || n / dim > dim : n != n_row) {
            xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: tensor %s holds %llu numbers, expected %llu%s", path.c_str(), name,
                      (unsigned long long) n, (unsigned long long) dim, basis ? " for each of at most as many directions" : "");
        }
        const tensor t = { type, gguf_get_data_offset(ctx.get()) + gguf_get_tensor_offset(ctx.get(), id), n };
        if (t.offset + n * ggml_type_size(type) > size) {
            xkv_throw(XKV_STATUS_FORMAT, "sidecar %s: tensor %s ends beyond the file's %llu bytes; the file is truncated", path.c_str(),
                      name, (unsigned long long) size);
        }
        return t;
    };
    for (size_t g = 0; g < groups.size(); ++g) {
        for (int kd = K; kd <= V; ++kd) {
            const uint64_t dim = groups[g].dim[kd];
            if (dim == 0) {
                bases[kd].emplace_back();
                means[kd].emplace_back();
                spectra[kd].emplace_back();
                continue;
            }
            bases[kd].push_back(find(g, kd, "basis", 0));
            means[kd].push_back(find(g, kd, "mean", dim));
            spectra[kd].push_back(find(g, kd, "spectrum", dim));
        }
    }
}

xkv_sidecar::stamp xkv_sidecar::look() const {
    struct stat st = {};
    if (fstat(fileno(file.get()), &st) != 0) {
        xkv_throw(XKV_STATUS_IO, "sidecar %s: its size cannot be read", path.c_str());
    }
#if defined(__APPLE__)
    return { (int64_t) st.st_size, (int64_t) st.st_mtimespec.tv_sec, (int64_t) st.st_mtimespec.tv_nsec };
#elif defined(_WIN32)
    return { (int64_t) st.st_size, (int64_t) st.st_mtime, 0 };
#else
    return { (int64_t) st.st_size, (int64_t) st.st_mtim.tv_sec, (int64_t) st.st_mtim.tv_nsec };
#endif
}

xkv_floats xkv_sidecar::read(const tensor & t, uint64_t n, uint64_t first) const {
    if (n == 0) {
        return {};
    }
    xkv_floats               res(n);
    std::vector<ggml_fp16_t> half(t.type == GGML_TYPE_F16 ? n : 0);

    const size_t   size = ggml_type_size((ggml_type) t.type);
    const uint64_t at   = t.offset + first * size;
    void *         dst  = t.type == GGML_TYPE_F16 ? (void *) half.data() : (void *) res.data();
    {
        std::lock_guard<std::mutex> lock(file_mutex);
        // bases of another conversion would go unnoticed
        if (!(look() == opened)) {
            xkv_throw(XKV_STATUS_IO, "sidecar %s: it was written to while it is in use; open the model again", path.c_str());
        }
        if (fseek(file.get(), (long) at, SEEK_SET) != 0 || fread(dst, size, n, file.get()) != n) {
            xkv_throw(XKV_STATUS_IO, "sidecar %s: cannot read %llu numbers at byte %llu", path.c_str(), (unsigned long long) n,
                      (unsigned long long) at);
        }
    }
    if (t.type == GGML_TYPE_F16) {
        ggml_fp16_to_fp32_row(half.data(), res.data(), n);
    }
    return res;
}

xkv_floats xkv_sidecar::basis(uint32_t g, kind kd, uint32_t n_row, uint32_t first) const {
    const uint64_t dim = groups[g].dim[kd];
    xkv_floats     res;
    const uint64_t held = calibrated() && dim > 0 ? bases[kd][g].n / dim : 0;
    if (first < held) {
        res = read(bases[kd][g], std::min<uint64_t>(n_row, held - first) * dim, first * dim);
    }
    res.resize(n_row * dim, 0.0f);
    return res;
}

xkv_floats xkv_sidecar::mean(uint32_t g, kind kd) const {
    return calibrated() ? read(means[kd][g], groups[g].dim[kd]) : xkv_floats(groups[g].dim[kd], 0.0f);
}

xkv_floats xkv_sidecar::spectrum(uint32_t g, kind kd) const {
    return calibrated() ? read(spectra[kd][g], groups[g].dim[kd]) : xkv_floats(groups[g].dim[kd], 0.0f);
}
