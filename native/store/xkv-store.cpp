#include "store/xkv-store.h"

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "ops/xkv_attn/xkv-attn-op.h"
#include "store/xkv-pack.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstring>
#include <map>

ggml_backend_buffer_type_t xkv_store::buft(uint32_t il) const {
    return offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
}

ggml_backend_dev_t xkv_store::device(uint32_t il) const {
    return offload ? model.dev_layer(il) : ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

bool xkv_is_rpc(ggml_backend_dev_t dev) {
    return strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0;
}

void xkv_store::check_devices() const {
    for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
        const auto & list = sidecar.groups[ig].layers;
        for (uint32_t il : list) {
            if (buft(il) != buft(list[0])) {
                xkv_throw(
                    XKV_STATUS_UNSUPPORTED,
                    "group %zu has layer %u on %s and layer %u on %s, expected one device for layers that share coefficients; move the "
                    "border by tensor_split or n_gpu_layers",
                    ig, list[0], ggml_backend_buft_name(buft(list[0])), il, ggml_backend_buft_name(buft(il)));
            }
        }
    }
}

bool xkv_has_attn(ggml_backend_dev_t dev, int64_t d_k, int64_t d_v, int64_t n_head, int64_t n_head_kv) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/8 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true }));

    const xkv_attn_params params = {};
    ggml_tensor *         q      = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, d_k, n_head, 1, 1);
    ggml_tensor *         k      = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, d_k, n_head_kv, 32, 1);
    ggml_tensor *         v      = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, d_v, n_head_kv, 32, 1);
    ggml_tensor *         m      = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, 32, 1, 1, 1);
    ggml_tensor *         t      = xkv_attn(ctx.get(), { q, k, v, m, nullptr, nullptr, nullptr, nullptr, nullptr }, &params);
    return xkv_attn_fits(t) && ggml_backend_dev_supports_op(dev, t);
}

bool xkv_store::can_pack(const std::vector<uint32_t> & layers) const {
    const auto & hp = model.hparams;

    return std::all_of(layers.begin(), layers.end(), [&](uint32_t il) {
        const bool cpu  = ggml_backend_dev_type(device(il)) == GGML_BACKEND_DEVICE_TYPE_CPU;
        const auto kind = xkv_is_rpc(device(il)) ? XKV_FUSED_RPC : cpu ? XKV_FUSED_CPU : XKV_FUSED_OTHER;
        // the op reads coefficients of V
        return (fused & kind) != 0 && !xkv_v_in_k(hp, il) &&
               xkv_has_attn(device(il), hp.n_embd_head_k(il), hp.n_embd_head_v(il), hp.n_head(il), hp.n_head_kv(il));
    });
}

void xkv_pretend(ggml_context * ctx, ggml_backend_buffer_t buf) {
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        t->buffer = buf;
    }
}

xkv_store::pool xkv_store::make_pool(part what, size_t n_tensors, const std::function<void(const ctx_of_t & ctx_of)> & make) const {
    pool res = { what, {}, {} };

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    make([&](uint32_t il) {
        auto & ctx = ctx_map[buft(il)];
        if (!ctx) {
            res.ctxs.push_back(ggml_context_ptr(
                ggml_init({ /*.mem_size =*/n_tensors * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true })));
            ctx = res.ctxs.back().get();
        }
        return ctx;
    });
    for (const auto & [type, ctx] : ctx_map) {
        const size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, type);

        block mem = { ggml_backend_buffer_ptr(no_alloc ? ggml_backend_buft_alloc_buffer(type, 0) :
                                                         ggml_backend_alloc_ctx_tensors_from_buft(ctx, type)),
                      size };
        if (!mem.buf) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the xkv store (%zu bytes on %s); use a smaller n_ctx or a higher ratio", size,
                      ggml_backend_buft_name(type));
        }
        if (no_alloc) {
            xkv_pretend(ctx, mem.buf.get());
        } else {
            mem.size = ggml_backend_buffer_get_size(mem.buf.get());
        }
        ggml_backend_buffer_clear(mem.buf.get(), 0);
        res.blocks.push_back(std::move(mem));
    }
    return res;
}

xkv_store::xkv_store(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config, const xkv_layers & layers,
                     uint32_t n_stream, bool offload) :
    n_chunk(sidecar.frame), n_slot(config.n_slot), n_stream(n_stream), model(model), sidecar(sidecar), offload(offload),
    no_alloc(model.hparams.no_alloc), fused(config.fused), stages(config.stages), own(n_stream) {
    const auto & hparams = model.hparams;

    stages.back().n_slot = n_slot;
    // streams fill at different times, but share the tensors
    stages.erase(stages.begin(), n_stream > 1 ? stages.end() - 1 : stages.begin());
    if (stages.size() > 1 && stages[stages.size() - 2].n_slot >= n_slot) {
        xkv_throw(XKV_STATUS_INVALID_ARGUMENT, "a stage has %u slots, expected below the %u of the store", stages[stages.size() - 2].n_slot,
                  n_slot);
    }

    for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
        uint32_t place  = 0;
        uint32_t off[2] = { 0, 0 };
        for (uint32_t il : sidecar.groups[ig].layers) {
            slot_of[il] = layer_list.size();
            layer_list.push_back({ il, (uint32_t) ig, place++, { off[0], off[1] }, xkv_v_in_k(hparams, il), nullptr, nullptr, nullptr });
            off[0] += sidecar.n_embd[0][il];
            off[1] += sidecar.n_embd[1][il];
        }
    }

    for (const auto & [il, from] : layers.shared) {
        slot_of[il] = slot_of.at(from);
    }

    check_devices();
    make_arena();

    means = make_pool(PART_MEANS, 3 * layer_list.size(), [&](const ctx_of_t & ctx_of) {
        for (auto & l : layer_list) {
            auto * ctx = ctx_of(groups()[l.ig].layers[0]);
            l.mean_k   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, hparams.n_embd_k_gqa(l.il));
            if (l.v_in_k) {
                continue;
            }
            l.mean_v = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, hparams.n_embd_v_gqa(l.il));
            l.mean_o = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, hparams.n_embd_head_v(l.il) * hparams.n_head(l.il));
        }
    });
    if (!no_alloc) {
        fill_means();
    }

    for (const auto & [name, bytes] : parts()) {
        LLAMA_LOG_INFO("%s: %-20s %8.2f MiB\n", __func__, name.c_str(), bytes / 1024.0 / 1024.0);
    }
}

std::vector<xkv_store::kind> xkv_store::kinds(uint32_t ig) const {
    return sidecar.groups[ig].dim[kind::V] > 0 ? std::vector<kind>{ kind::K, kind::V } : std::vector<kind>{ kind::K };
}

//
// coefficients
//

// Coefficients of a segment stand as rows that are quantized: K [n_chunk, rank], V [rank, n_chunk]. In a plain store, packed, so
// does each KV head.
template <typename F> static void xkv_each_number(const xkv_store::segment & seg, xkv_store::kind kd, uint32_t n_chunk, F && f) {
    const uint32_t n = seg.rank / seg.n_head; // of a head
    for (uint32_t h = 0; h < seg.n_head; ++h) {
        for (uint32_t i = 0; i < n_chunk; ++i) {
            for (uint32_t r = 0; r < n; ++r) {
                f((size_t) h * n * n_chunk + (kd == xkv_store::kind::K ? (size_t) i * n + r : (size_t) r * n_chunk + i), i, h * n + r);
            }
        }
    }
}

xkv_floats xkv_store::get_coef(kind kd, uint32_t ig, uint32_t stream, uint32_t ic) const {
    const group & gr = now.groups[ig];

    xkv_floats           res((size_t) n_chunk * gr.rank[kd]);
    std::vector<uint8_t> data;
    xkv_floats           x;
    for (const auto & seg : gr.segments[kd]) {
        x.resize((size_t) n_chunk * seg.rank);
        data.resize(ggml_row_size(seg.type, x.size()));
        if (gr.packed) {
            const uint32_t n = seg.rank / seg.n_head;
            ggml_backend_tensor_get(gr.packed, data.data(), stream * gr.packed->nb[2] + ic * gr.packed->nb[1] + seg.offset, data.size());
            for (uint32_t h = 0; h < seg.n_head; ++h) {
                const uint8_t * from = data.data() + h * data.size() / seg.n_head;
                xkv_unpack(seg.type, from, kd == kind::K ? n_chunk : n, kd == kind::K ? n : n_chunk, x.data() + (size_t) h * n * n_chunk);
            }
        } else {
            const ggml_tensor * t = seg.coef;
            if (kd == kind::K) {
                ggml_backend_tensor_get(t, data.data(), stream * t->nb[2] + ic * data.size(), data.size());
            } else {
                const size_t n_byte = ggml_row_size(t->type, n_chunk);
                ggml_backend_tensor_get_2d(t, data.data(), stream * t->nb[2] + ic * n_byte, n_byte, seg.rank, t->nb[1], n_byte);
            }
            xkv_decode(seg.type, data.data(), x.data(), x.size());
        }
        xkv_each_number(seg, kd, n_chunk,
                        [&](size_t at, uint32_t i, uint32_t r) { res[(size_t) i * gr.rank[kd] + seg.first + r] = x[at]; });
    }
    return res;
}

// those of a segment as they stand
static void xkv_gather(const xkv_store::segment & seg, xkv_store::kind kd, uint32_t n_chunk, uint32_t rank, const float * coef,
                       xkv_floats & x) {
    x.resize((size_t) n_chunk * seg.rank);
    xkv_each_number(seg, kd, n_chunk, [&](size_t at, uint32_t i, uint32_t r) { x[at] = coef[(size_t) i * rank + seg.first + r]; });
}

void xkv_store::pack_coef(const group & gr, kind kd, const float * coef, uint8_t * chunk) const {
    xkv_floats x;
    for (const auto & seg : gr.segments[kd]) {
        xkv_gather(seg, kd, n_chunk, gr.rank[kd], coef, x);
        const uint32_t n = seg.rank / seg.n_head;
        for (uint32_t h = 0; h < seg.n_head; ++h) {
            uint8_t * to = chunk + seg.offset + h * ggml_row_size(seg.type, (int64_t) n * n_chunk);
            xkv_pack(seg.type, x.data() + (size_t) h * n * n_chunk, kd == kind::K ? n_chunk : n, kd == kind::K ? n : n_chunk, to);
        }
    }
}

void xkv_store::set_packed(const group & gr, uint32_t stream, uint32_t ic, const std::vector<uint8_t> & chunk) const {
    ggml_backend_tensor_set(gr.packed, chunk.data(), stream * gr.packed->nb[2] + ic * gr.packed->nb[1], chunk.size());
}

void xkv_store::set_coef(const group & gr, kind kd, uint32_t stream, uint32_t ic, const float * coef) const {
    std::vector<uint8_t> data;
    if (gr.packed) {
        data.resize(gr.packed->ne[0]);
        pack_coef(gr, kd, coef, data.data());
        for (const auto & seg : gr.segments[kd]) {
            ggml_backend_tensor_set(gr.packed, data.data() + seg.offset, stream * gr.packed->nb[2] + ic * gr.packed->nb[1] + seg.offset,
                                    ggml_row_size(seg.type, (int64_t) n_chunk * seg.rank));
        }
        return;
    }
    xkv_floats x;
    for (const auto & seg : gr.segments[kd]) {
        xkv_gather(seg, kd, n_chunk, gr.rank[kd], coef, x);
        data.resize(ggml_row_size(seg.type, x.size()));
        ggml_tensor * t = seg.coef;
        xkv_encode(seg.type, x.data(), data.data(), x.size());
        if (kd == kind::K) {
            ggml_backend_tensor_set(t, data.data(), stream * t->nb[2] + ic * data.size(), data.size());
        } else {
            const size_t n_byte = ggml_row_size(t->type, n_chunk);
            ggml_backend_tensor_set_2d(t, data.data(), stream * t->nb[2] + ic * n_byte, n_byte, seg.rank, t->nb[1], n_byte);
        }
    }
}

void xkv_store::copy_stream(uint32_t src, uint32_t dst) {
    reset_bases(dst);
    if (own[src]) {
        own_bases(dst);
        copy_bases(own[src]->bases, own[dst]->bases);
    }
    std::vector<uint8_t> data;
    const auto           copy = [&](ggml_tensor * t) {
        data.resize(t->nb[2]);
        ggml_backend_tensor_get(t, data.data(), src * data.size(), data.size());
        ggml_backend_tensor_set(t, data.data(), dst * data.size(), data.size());
    };
    for (const auto & gr : now.groups) {
        if (gr.packed) {
            copy(gr.packed);
            continue;
        }
        for (auto kd : { kind::K, kind::V }) {
            for (const auto & seg : gr.segments[kd]) {
                copy(seg.coef);
            }
        }
    }
}

//
// report
//

std::vector<std::pair<std::string, size_t>> xkv_store::parts() const {
    size_t bytes[PART_COUNT];
    std::copy(std::begin(arena_bytes), std::end(arena_bytes), bytes);

    const auto count = [&](const pool & p) {
        for (const auto & mem : p.blocks) {
            bytes[p.what] += mem.size;
        }
    };
    count(means);
    for (const auto & set : own) {
        if (set) {
            count(set->mem);
        }
    }
    return {
        { "K coefficients", bytes[PART_COEF_K] },
        { "V coefficients", bytes[PART_COEF_V] },
        { "bases and means", bytes[PART_BASES] + bytes[PART_MEANS] },
    };
}

std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> xkv_store::buffers() const {
    std::vector<std::pair<ggml_backend_buffer_type_t, size_t>> res;

    const auto list = [&](const pool & p) {
        for (const auto & mem : p.blocks) {
            res.emplace_back(ggml_backend_buffer_get_type(mem.buf.get()), mem.size);
        }
    };
    for (const auto & [type, mem] : arena) {
        res.emplace_back(type, mem.size);
    }
    list(means);
    for (const auto & set : own) {
        if (set) {
            list(set->mem);
        }
    }
    return res;
}
