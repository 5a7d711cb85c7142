// Bases and means of the store: from the sidecar, and a stream's own once they have been adapted.

#include "xkv-codec.h"
#include "xkv-error.h"
#include "xkv-store.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

ggml_tensor * xkv_store::basis(kind kd, uint32_t il, uint32_t stream) const {
    return bases_of(stream).basis[kd][il];
}

bool xkv_store::shares_bases(uint32_t s0, uint32_t n) const {
    return std::none_of(own.begin() + s0, own.begin() + s0 + n, [](const auto & set) { return set != nullptr; });
}

std::unique_ptr<xkv_store::basis_set> xkv_store::make_bases() const {
    auto set = std::make_unique<basis_set>();
    for (auto kd : { kind::K, kind::V }) {
        set->basis[kd].resize(layers.size());
    }
    set->mem = make_pool(PART_BASES, 2*layers.size(), [&](const ctx_of_t & ctx_of) {
        for (uint32_t il = 0; il < layers.size(); ++il) {
            const auto & gr  = groups[layers[il].ig];
            auto *       ctx = ctx_of(gr.first);
            set->basis[kind::K][il] = ggml_new_tensor_2d(ctx, type_basis, model.hparams.n_embd_k_gqa(il), gr.rank[kind::K]);
            set->basis[kind::V][il] = ggml_new_tensor_2d(ctx, type_basis, gr.rank[kind::V], model.hparams.n_embd_v_gqa(il));
            ggml_format_name(set->basis[kind::K][il], "xkv_basis_k_l%u", il);
            ggml_format_name(set->basis[kind::V][il], "xkv_basis_v_l%u", il);
        }
    });
    return set;
}

void xkv_store::write_basis(basis_set & set, kind kd, uint32_t ig, const std::vector<float> & rows) const {
    const group &  gr   = groups[ig];
    const uint32_t rank = gr.rank[kd];
    const uint32_t dim  = gr.dim[kd];
    GGML_ASSERT(rows.size() == (size_t) rank*dim);

    for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
        ggml_tensor *  t      = set.basis[kd][il];
        const uint32_t n_embd = ggml_nelements(t)/rank;

        std::vector<float> x(ggml_nelements(t));
        for (uint32_t r = 0; r < rank; ++r) {
            for (uint32_t i = 0; i < n_embd; ++i) {
                x[kd == kind::K ? (size_t) r*n_embd + i : (size_t) i*rank + r] = rows[(size_t) r*dim + layers[il].off[kd] + i];
            }
        }
        std::vector<uint8_t> data(ggml_nbytes(t));
        xkv_encode(t->type, x.data(), data.data(), x.size());
        ggml_backend_tensor_set(t, data.data(), 0, data.size());
    }
}

std::vector<float> xkv_store::get_basis(kind kd, uint32_t ig, uint32_t stream) const {
    const group &  gr   = groups[ig];
    const uint32_t rank = gr.rank[kd];
    const uint32_t dim  = gr.dim[kd];

    std::vector<float> rows((size_t) rank*dim);
    for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
        const ggml_tensor * t      = basis(kd, il, stream);
        const uint32_t      n_embd = ggml_nelements(t)/rank;

        std::vector<uint8_t> data(ggml_nbytes(t));
        std::vector<float>   x(ggml_nelements(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        xkv_decode(t->type, data.data(), x.data(), x.size());
        for (uint32_t r = 0; r < rank; ++r) {
            for (uint32_t i = 0; i < n_embd; ++i) {
                rows[(size_t) r*dim + layers[il].off[kd] + i] = x[kd == kind::K ? (size_t) r*n_embd + i : (size_t) i*rank + r];
            }
        }
    }
    return rows;
}

void xkv_store::set_basis(kind kd, uint32_t ig, uint32_t stream, const std::vector<float> & rows) {
    auto & set = own[stream] ? *own[stream] : *calibrated;
    set.changed = true;
    write_basis(set, kd, ig, rows);
}

void xkv_store::own_bases(uint32_t stream) {
    // a single stream changes the calibrated bases in place: the sidecar has them still
    if (n_stream > 1 && !own[stream]) {
        own[stream] = make_bases();
        n_basis_change++;
    }
}

void xkv_store::reset_bases(uint32_t stream) {
    if (own[stream]) {
        own[stream].reset();
        n_basis_change++;
    } else if (calibrated->changed && n_stream == 1) {
        fill_bases(*calibrated);
        calibrated->changed = false;
    }
}

void xkv_store::fill_bases(basis_set & set) const {
    for (size_t ig = 0; ig < groups.size(); ++ig) {
        const group & gr = groups[ig];
        for (auto kd : { kind::K, kind::V }) {
            const uint32_t n_row = std::min(gr.rank[kd], gr.dim[kd]);

            auto rows = sidecar.basis(ig, kd, n_row);
            rows.resize((size_t) gr.rank[kd]*gr.dim[kd], 0.0f);
            write_basis(set, kd, ig, rows);
        }
    }
}

void xkv_store::fill_means() {
    const auto & hparams = model.hparams;

    for (size_t ig = 0; ig < groups.size(); ++ig) {
        const group & gr = groups[ig];

        const auto mean_k = sidecar.mean(ig, kind::K);
        const auto mean_v = sidecar.mean(ig, kind::V);
        for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
            const layer &  l          = layers[il];
            const float *  v          = mean_v.data() + l.off[kind::V];
            const uint32_t n_head_dim = hparams.n_embd_head_v(il);

            std::vector<float> mean_o;
            for (uint32_t h = 0; h < hparams.n_head(il); ++h) {
                const float * head = v + (size_t) (h/hparams.n_gqa(il))*n_head_dim;
                mean_o.insert(mean_o.end(), head, head + n_head_dim);
            }
            ggml_backend_tensor_set(l.mean_k, mean_k.data() + l.off[kind::K], 0, ggml_nbytes(l.mean_k));
            ggml_backend_tensor_set(l.mean_v, v,                              0, ggml_nbytes(l.mean_v));
            ggml_backend_tensor_set(l.mean_o, mean_o.data(),                  0, ggml_nbytes(l.mean_o));
        }
    }
}
