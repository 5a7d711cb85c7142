#include "xkv-store.h"

#include "xkv-error.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <map>

xkv_store::xkv_store(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config, uint32_t n_slot,
                     uint32_t n_stream, bool offload) :
    n_chunk(sidecar.frame), n_slot(n_slot), n_stream(n_stream) {
    const auto & hparams = model.hparams;

    // one context per part and buffer type, so that the bytes of a part are those of its buffers
    std::map<std::pair<int, ggml_backend_buffer_type_t>, ggml_context *> ctx_map;

    const size_t n_tensors = sidecar.groups.size()*2*(1 + n_stream) + hparams.n_layer()*5;

    auto buft_for = [&](uint32_t il) {
        return offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type();
    };

    auto ctx_for = [&](part p, uint32_t il) {
        auto * buft = buft_for(il);
        auto & ctx  = ctx_map[{ p, buft }];
        if (!ctx) {
            ctx = ggml_init({ /*.mem_size =*/ n_tensors*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true });
            ctxs.emplace_back(ctx);
        }
        return ctx;
    };

    layers.resize(hparams.n_layer());

    for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
        const auto & sg = sidecar.groups[ig];

        group gr = {};
        gr.first = sg.first;
        gr.count = sg.count;
        for (int kd = 0; kd < 2; ++kd) {
            gr.rank[kd] = GGML_PAD(config.rank[kd][ig], 32);
        }

        ggml_context * ctx_k = ctx_for(PART_COEF_K, gr.first);
        ggml_context * ctx_v = ctx_for(PART_COEF_V, gr.first);
        const bool on_host   = ggml_backend_buft_is_host(buft_for(gr.first));

        gr.coef_k = ggml_new_tensor_3d(ctx_k, config.type_coef[0], gr.rank[0], n_slot, n_stream);
        gr.coef_v = ggml_new_tensor_3d(ctx_v, config.type_coef[1], n_slot, gr.rank[1], n_stream);
        ggml_format_name(gr.coef_k, "xkv_coef_k_g%zu", ig);
        ggml_format_name(gr.coef_v, "xkv_coef_v_g%zu", ig);

        for (uint32_t s = 0; s < n_stream; ++s) {
            gr.coef_k_stream.push_back(ggml_view_2d(ctx_k, gr.coef_k, gr.rank[0], n_slot, gr.coef_k->nb[1], s*gr.coef_k->nb[2]));
            gr.coef_v_stream.push_back(ggml_view_2d(ctx_v, gr.coef_v, n_slot, gr.rank[1], gr.coef_v->nb[1], s*gr.coef_v->nb[2]));
        }

        for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
            ggml_context * ctx = ctx_for(PART_BASES, gr.first);

            // decoding takes every query through basis_k once per chunk, and on the CPU f32 is the faster type for that
            const ggml_type type_k = on_host ? GGML_TYPE_F32 : config.type_basis;

            const uint32_t n_embd_k = hparams.n_embd_k_gqa(il);
            const uint32_t n_embd_v = hparams.n_embd_v_gqa(il);

            layer & l = layers[il];
            l.ig      = ig;
            l.basis_k = ggml_new_tensor_2d(ctx, type_k, n_embd_k, gr.rank[0] + n_mean_row);
            l.basis_v = ggml_new_tensor_2d(ctx, config.type_basis, gr.rank[1], n_embd_v);
            l.mean_k  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd_k);
            l.mean_v  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_embd_v);
            l.mean_o  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, hparams.n_embd_head_v(il)*hparams.n_head(il));
            ggml_format_name(l.basis_k, "xkv_basis_k_l%u", il);
            ggml_format_name(l.basis_v, "xkv_basis_v_l%u", il);
        }
        groups.push_back(gr);
    }

    for (const auto & [key, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, key.second);
        if (!buf) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the xkv store (%zu bytes on %s); use a smaller n_ctx or a higher ratio",
                      ggml_backend_alloc_ctx_tensors_from_buft_size(ctx, key.second), ggml_backend_buft_name(key.second));
        }
        ggml_backend_buffer_clear(buf, 0);
        bufs.emplace_back(buf);
        buf_parts.push_back((part) key.first);
    }

    fill_bases(model, sidecar, config);

    for (const auto & [name, bytes] : parts()) {
        LLAMA_LOG_INFO("%s: %-20s %8.2f MiB\n", __func__, name.c_str(), bytes/1024.0/1024.0);
    }
}

// data [n] as the tensor's type; rows of quantized types are not used for bases
static void xkv_set_tensor(ggml_tensor * t, const std::vector<float> & data) {
    GGML_ASSERT((int64_t) data.size() == ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        ggml_backend_tensor_set(t, data.data(), 0, ggml_nbytes(t));
        return;
    }
    std::vector<ggml_fp16_t> half(data.size());
    ggml_fp32_to_fp16_row(data.data(), half.data(), data.size());
    ggml_backend_tensor_set(t, half.data(), 0, ggml_nbytes(t));
}

void xkv_store::fill_bases(const llama_model & model, const xkv_sidecar & sidecar, const xkv_config & config) {
    const auto & hparams = model.hparams;

    for (size_t ig = 0; ig < groups.size(); ++ig) {
        const group & gr = groups[ig];

        for (auto kd : { xkv_sidecar::K, xkv_sidecar::V }) {
            const uint32_t rank  = config.rank[kd][ig];
            const uint32_t dim   = sidecar.groups[ig].dim[kd];
            const auto     basis = sidecar.basis(ig, kd, rank);
            const auto     mean  = sidecar.mean (ig, kd);

            size_t off = 0; // the layer's first column
            for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
                const layer &  l      = layers[il];
                const uint32_t n_embd = sidecar.n_embd[kd][il];

                const std::vector<float> mean_l(mean.begin() + off, mean.begin() + off + n_embd);

                std::vector<float> data(ggml_nelements(kd == xkv_sidecar::K ? l.basis_k : l.basis_v), 0.0f);
                for (uint32_t r = 0; r < rank; ++r) {
                    for (uint32_t i = 0; i < n_embd; ++i) {
                        const float x = basis[(size_t) r*dim + off + i];
                        if (kd == xkv_sidecar::K) {
                            data[(size_t) r*n_embd + i] = x;
                        } else {
                            data[(size_t) i*gr.rank[1] + r] = x;
                        }
                    }
                }
                if (kd == xkv_sidecar::K) {
                    std::copy(mean_l.begin(), mean_l.end(), data.begin() + (size_t) gr.rank[0]*n_embd);
                    xkv_set_tensor(l.basis_k, data);
                    xkv_set_tensor(l.mean_k, mean_l);
                } else {
                    xkv_set_tensor(l.basis_v, data);
                    xkv_set_tensor(l.mean_v, mean_l);

                    const uint32_t n_head_dim = hparams.n_embd_head_v(il);
                    const uint32_t n_gqa      = hparams.n_gqa(il);

                    std::vector<float> mean_o;
                    for (uint32_t h = 0; h < hparams.n_head(il); ++h) {
                        const auto head = mean_l.begin() + (size_t) (h/n_gqa)*n_head_dim;
                        mean_o.insert(mean_o.end(), head, head + n_head_dim);
                    }
                    xkv_set_tensor(l.mean_o, mean_o);
                }
                off += n_embd;
            }
        }
    }
}

void xkv_store::clear() {
    for (size_t i = 0; i < bufs.size(); ++i) {
        if (buf_parts[i] != PART_BASES) {
            ggml_backend_buffer_clear(bufs[i].get(), 0);
        }
    }
}

std::vector<std::pair<std::string, size_t>> xkv_store::parts() const {
    static const char * names[PART_COUNT] = { "K coefficients", "V coefficients", "bases and means" };

    std::vector<std::pair<std::string, size_t>> res;
    for (int p = 0; p < PART_COUNT; ++p) {
        size_t bytes = 0;
        for (size_t i = 0; i < bufs.size(); ++i) {
            bytes += buf_parts[i] == p ? ggml_backend_buffer_get_size(bufs[i].get()) : 0;
        }
        res.emplace_back(names[p], bytes);
    }
    return res;
}
