// Bases and means of the store: from the sidecar, and a stream's own once they have been adapted.

#include "base/xkv-codec.h"
#include "store/xkv-store.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

ggml_tensor * xkv_store::basis(kind kd, uint32_t il, uint32_t is, uint32_t stream) const {
    GGML_ASSERT(!plain());
    return bases_of(stream).tensors[kd][slot_of.at(il)][is];
}

const xkv_store::segment & xkv_store::plain_segment(kind kd, uint32_t il) const {
    GGML_ASSERT(plain());
    const layer & l = layer_of(il);
    return now.groups[l.ig].segments[kd][l.place];
}

bool xkv_store::shares_bases(uint32_t s0, uint32_t n) const {
    return std::none_of(own.begin() + s0, own.begin() + s0 + n, [](const auto & set) { return set != nullptr; });
}

xkv_store::basis_set xkv_store::make_bases(const std::vector<group> & groups, const ctx_of_t & ctx_of) const {
    basis_set res;
    for (auto kd : { kind::K, kind::V }) {
        res.tensors[kd].resize(layer_list.size());
        for (size_t i = 0; i < layer_list.size(); ++i) {
            const uint32_t il = layer_list[i].il;
            const auto &   gr = groups[layer_list[i].ig];
            for (const auto & seg : gr.segments[kd]) {
                ggml_tensor * t = kd == kind::K ?
                    ggml_new_tensor_2d(ctx_of(gr.layers[0]), seg.type_basis, model.hparams.n_embd_k_gqa(il), seg.rank) :
                    ggml_new_tensor_2d(ctx_of(gr.layers[0]), seg.type_basis, seg.rank, model.hparams.n_embd_v_gqa(il));
                ggml_format_name(t, "xkv_basis_%c_l%u_%s", kd == kind::K ? 'k' : 'v', il, ggml_type_name(seg.type));
                res.tensors[kd][i].push_back(t);
            }
        }
    }
    return res;
}

// where the number of direction r of a segment for number i of a layer stands in its basis
static size_t xkv_basis_index(const ggml_tensor * t, xkv_store::kind kd, uint32_t r, uint32_t i) {
    return kd == xkv_store::kind::K ? (size_t) r*t->ne[0] + i : (size_t) i*t->ne[0] + r;
}

void xkv_store::write_basis(const std::vector<group> & groups, const basis_set & bases, kind kd, uint32_t ig, const std::vector<float> & rows) const {
    const group &  gr  = groups[ig];
    const uint32_t dim = gr.dim[kd];
    GGML_ASSERT(rows.size() == (size_t) gr.rank[kd]*dim);

    for (uint32_t il : gr.layers) {
        const uint32_t off = layer_of(il).off[kd];
        for (size_t is = 0; is < gr.segments[kd].size(); ++is) {
            const segment & seg    = gr.segments[kd][is];
            ggml_tensor *   t      = bases.tensors[kd][slot_of.at(il)][is];
            const uint32_t  n_embd = ggml_nelements(t)/seg.rank;

            std::vector<float> x(ggml_nelements(t));
            for (uint32_t r = 0; r < seg.rank; ++r) {
                for (uint32_t i = 0; i < n_embd; ++i) {
                    x[xkv_basis_index(t, kd, r, i)] = rows[(size_t) (seg.first + r)*dim + off + i];
                }
            }
            std::vector<uint8_t> data(ggml_nbytes(t));
            xkv_encode(t->type, x.data(), data.data(), x.size());
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
    }
}

std::vector<float> xkv_store::get_basis(kind kd, uint32_t ig, uint32_t stream) const {
    const group &  gr  = now.groups[ig];
    const uint32_t dim = gr.dim[kd];

    std::vector<float> rows((size_t) gr.rank[kd]*dim);
    for (uint32_t il : gr.layers) {
        const uint32_t off = layer_of(il).off[kd];
        for (size_t is = 0; is < gr.segments[kd].size(); ++is) {
            const segment &     seg    = gr.segments[kd][is];
            const ggml_tensor * t      = basis(kd, il, is, stream);
            const uint32_t      n_embd = ggml_nelements(t)/seg.rank;

            std::vector<uint8_t> data(ggml_nbytes(t));
            std::vector<float>   x(ggml_nelements(t));
            ggml_backend_tensor_get(t, data.data(), 0, data.size());
            xkv_decode(t->type, data.data(), x.data(), x.size());
            for (uint32_t r = 0; r < seg.rank; ++r) {
                for (uint32_t i = 0; i < n_embd; ++i) {
                    rows[(size_t) (seg.first + r)*dim + off + i] = x[xkv_basis_index(t, kd, r, i)];
                }
            }
        }
    }
    return rows;
}

void xkv_store::set_basis(kind kd, uint32_t ig, uint32_t stream, const std::vector<float> & rows, const layout * next) {
    if (next) {
        write_basis(next->groups, next->bases, kd, ig, rows);
        return;
    }
    changed = changed || !own[stream];
    write_basis(now.groups, bases_of(stream), kd, ig, rows);
}

void xkv_store::own_bases(uint32_t stream) {
    // a single stream changes the calibrated bases in place: the sidecar has them still
    if (n_stream == 1 || own[stream]) {
        return;
    }
    size_t n = 0;
    for (const auto & l : layer_list) {
        n += now.groups[l.ig].segments[kind::K].size() + now.groups[l.ig].segments[kind::V].size();
    }
    auto set = std::make_unique<own_bases_t>();
    set->mem = make_pool(PART_BASES, n, [&](const ctx_of_t & ctx_of) { set->bases = make_bases(now.groups, ctx_of); });
    copy_bases(now.bases, set->bases);
    own[stream] = std::move(set);
    n_tensor_change++;
}

void xkv_store::copy_bases(const basis_set & src, const basis_set & dst) const {
    for (auto kd : { kind::K, kind::V }) {
        for (size_t i = 0; i < src.tensors[kd].size(); ++i) {
            for (size_t is = 0; is < src.tensors[kd][i].size(); ++is) {
                ggml_backend_tensor_copy(src.tensors[kd][i][is], dst.tensors[kd][i][is]);
            }
        }
    }
}

void xkv_store::reset_bases(uint32_t stream) {
    if (own[stream]) {
        own[stream].reset();
        n_tensor_change++;
    } else if (changed) {
        fill_bases(now);
        changed = false;
    }
}

void xkv_store::fill_bases(const layout & l) const {
    if (stages[l.stage].plain()) {
        return;
    }
    for (size_t ig = 0; ig < l.groups.size(); ++ig) {
        const group & gr = l.groups[ig];
        for (auto kd : { kind::K, kind::V }) {
            write_basis(l.groups, l.bases, kd, ig, sidecar.basis(ig, kd, gr.rank[kd]));
        }
    }
}

void xkv_store::fill_means() {
    const auto & hparams = model.hparams;

    for (size_t ig = 0; ig < now.groups.size(); ++ig) {
        const group & gr = now.groups[ig];

        const auto mean_k = sidecar.mean(ig, kind::K);
        const auto mean_v = sidecar.mean(ig, kind::V);
        for (uint32_t il : gr.layers) {
            const layer &  l          = layer_of(il);
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

// products with quantized rows need the rows as they are stored, so the other direction goes through f32
static ggml_tensor * xkv_transposed_f32(ggml_context * ctx, ggml_tensor * basis) {
    basis = basis->type == GGML_TYPE_F32 ? basis : ggml_cast(ctx, basis, GGML_TYPE_F32);
    return ggml_cont(ctx, ggml_transpose(ctx, basis));
}

ggml_tensor * xkv_to_coef(ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * x) {
    return ggml_mul_mat(ctx, kd == xkv_store::kind::K ? basis : xkv_transposed_f32(ctx, basis), x);
}

ggml_tensor * xkv_from_coef(ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * coef) {
    return ggml_mul_mat(ctx, kd == xkv_store::kind::K ? xkv_transposed_f32(ctx, basis) : basis, coef);
}
