// Bases and means of the store: from the sidecar, and a stream's own once they have been adapted.

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "base/xkv-parallel.h"
#include "store/xkv-pack.h"
#include "store/xkv-store.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <tuple>

ggml_tensor * xkv_store::basis(kind kd, uint32_t il, uint32_t is, uint32_t stream) const {
    GGML_ASSERT(!plain());
    return bases_of(stream).tensors[kd][slot_of.at(il)][is];
}

ggml_tensor * xkv_store::packed_basis(uint32_t il, uint32_t stream) const {
    return bases_of(stream).packed[slot_of.at(il)];
}

uint32_t xkv_store::n_head_dim(kind kd, uint32_t il) const {
    return kd == kind::K ? model.hparams.n_embd_head_k(il) : model.hparams.n_embd_head_v(il);
}

void xkv_store::each_basis(const group & gr, kind kd, uint32_t il, int n_thread,
                           const std::function<void(const segment & seg, uint32_t head, size_t at)> & f) const {
    std::vector<std::tuple<const segment *, uint32_t, size_t>> pieces;

    size_t at = 0;
    for (auto k : { kind::K, kind::V }) {
        for (uint32_t h = 0; h < model.hparams.n_head_kv(il); ++h) {
            for (const auto & seg : gr.segments[k]) {
                if (k == kd) {
                    pieces.emplace_back(&seg, h, at);
                }
                const uint32_t n = n_head_dim(k, il);
                at += k == kind::K ? xkv_packed_size(seg.type_basis, seg.rank, n) : xkv_packed_size(seg.type_basis, n, seg.rank);
            }
        }
    }
    xkv_parallel(pieces.size(), n_thread, [&](size_t i) {
        const auto & [seg, head, begin] = pieces[i];
        f(*seg, head, begin);
    });
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
    res.packed.resize(layer_list.size(), nullptr);
    for (auto kd : { kind::K, kind::V }) {
        res.tensors[kd].resize(layer_list.size());
    }
    for (size_t i = 0; i < layer_list.size(); ++i) {
        const uint32_t il  = layer_list[i].il;
        const auto &   gr  = groups[layer_list[i].ig];
        auto *         ctx = ctx_of(gr.layers[0]);
        if (gr.pack) {
            size_t n_byte = 0;
            for (auto kd : { kind::K, kind::V }) {
                for (const auto & seg : gr.segments[kd]) {
                    n_byte += ggml_row_size(seg.type_basis, (int64_t) seg.rank * sidecar.n_embd[kd][il]);
                }
            }
            res.packed[i] = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, n_byte);
            ggml_format_name(res.packed[i], "xkv_basis_l%u", il);
            continue;
        }
        for (auto kd : { kind::K, kind::V }) {
            for (const auto & seg : gr.segments[kd]) {
                const int64_t n_embd = sidecar.n_embd[kd][il];
                ggml_tensor * t      = kd == kind::K ? ggml_new_tensor_2d(ctx, seg.type_basis, n_embd, seg.rank) :
                                                       ggml_new_tensor_2d(ctx, seg.type_basis, seg.rank, n_embd);
                ggml_format_name(t, "xkv_basis_%c_l%u_%s", kd == kind::K ? 'k' : 'v', il, ggml_type_name(seg.type));
                res.tensors[kd][i].push_back(t);
            }
        }
    }
    return res;
}

// where the number of direction r of a segment for number i of n stands in its basis: K by direction, V by number
static size_t xkv_basis_index(const xkv_store::segment & seg, xkv_store::kind kd, uint32_t n, uint32_t r, uint32_t i) {
    return kd == xkv_store::kind::K ? (size_t) r * n + i : (size_t) i * seg.rank + r;
}

void xkv_store::write_basis(const std::vector<group> & groups, const basis_set & bases, kind kd, uint32_t ig, const xkv_floats & rows,
                            int n_thread) const {
    const group &  gr  = groups[ig];
    const uint32_t dim = gr.dim[kd];
    GGML_ASSERT(rows.size() == (size_t) gr.rank[kd] * dim);

    // the segment's rows for n numbers of a layer
    const auto part = [&](const segment & seg, uint32_t first, uint32_t n) {
        xkv_floats x((size_t) seg.rank * n);
        for (uint32_t r = 0; r < seg.rank; ++r) {
            for (uint32_t i = 0; i < n; ++i) {
                x[xkv_basis_index(seg, kd, n, r, i)] = rows[(size_t) (seg.first + r) * dim + first + i];
            }
        }
        return x;
    };
    for (uint32_t il : gr.layers) {
        const uint32_t off = layer_of(il).off[kd];
        if (gr.pack) {
            ggml_tensor *  t = bases.packed[slot_of.at(il)];
            const uint32_t n = n_head_dim(kd, il);
            each_basis(gr, kd, il, n_thread, [&](const segment & seg, uint32_t head, size_t at) {
                const auto           x = part(seg, off + head * n, n);
                std::vector<uint8_t> data(ggml_row_size(seg.type_basis, x.size()));
                xkv_pack(seg.type_basis, x.data(), kd == kind::K ? seg.rank : n, kd == kind::K ? n : seg.rank, data.data());
                ggml_backend_tensor_set(t, data.data(), at, data.size());
            });
            continue;
        }
        for (size_t is = 0; is < gr.segments[kd].size(); ++is) {
            ggml_tensor *        t = bases.tensors[kd][slot_of.at(il)][is];
            const auto           x = part(gr.segments[kd][is], off, sidecar.n_embd[kd][il]);
            std::vector<uint8_t> data(ggml_nbytes(t));
            xkv_encode(t->type, x.data(), data.data(), x.size());
            ggml_backend_tensor_set(t, data.data(), 0, data.size());
        }
    }
}

xkv_floats xkv_store::get_basis_layer(kind kd, uint32_t il, uint32_t stream, int n_thread) const {
    const group &  gr     = now.groups[layer_of(il).ig];
    const uint32_t n_embd = sidecar.n_embd[kd][il];

    xkv_floats rows((size_t) gr.rank[kd] * n_embd);
    const auto put = [&](const xkv_floats & x, const segment & seg, uint32_t first, uint32_t n) {
        for (uint32_t r = 0; r < seg.rank; ++r) {
            for (uint32_t i = 0; i < n; ++i) {
                rows[(size_t) (seg.first + r) * n_embd + first + i] = x[xkv_basis_index(seg, kd, n, r, i)];
            }
        }
    };
    if (gr.pack) {
        const ggml_tensor * t = packed_basis(il, stream);
        const uint32_t      n = n_head_dim(kd, il);
        each_basis(gr, kd, il, n_thread, [&](const segment & seg, uint32_t head, size_t at) {
            xkv_floats           x((size_t) seg.rank * n);
            std::vector<uint8_t> data(ggml_row_size(seg.type_basis, x.size()));
            ggml_backend_tensor_get(t, data.data(), at, data.size());
            xkv_unpack(seg.type_basis, data.data(), kd == kind::K ? seg.rank : n, kd == kind::K ? n : seg.rank, x.data());
            put(x, seg, head * n, n);
        });
        return rows;
    }
    for (size_t is = 0; is < gr.segments[kd].size(); ++is) {
        const ggml_tensor *  t = basis(kd, il, is, stream);
        xkv_floats           x(ggml_nelements(t));
        std::vector<uint8_t> data(ggml_nbytes(t));
        ggml_backend_tensor_get(t, data.data(), 0, data.size());
        xkv_decode(t->type, data.data(), x.data(), x.size());
        put(x, gr.segments[kd][is], 0, n_embd);
    }
    return rows;
}

xkv_floats xkv_store::get_basis(kind kd, uint32_t ig, uint32_t stream, int n_thread) const {
    const group &  gr  = now.groups[ig];
    const uint32_t dim = gr.dim[kd];

    xkv_floats rows((size_t) gr.rank[kd] * dim);
    for (uint32_t il : gr.layers) {
        const auto     part = get_basis_layer(kd, il, stream, n_thread);
        const uint32_t n    = sidecar.n_embd[kd][il];
        for (uint32_t r = 0; r < gr.rank[kd]; ++r) {
            std::copy_n(part.begin() + (size_t) r * n, n, rows.begin() + (size_t) r * dim + layer_of(il).off[kd]);
        }
    }
    return rows;
}

void xkv_store::set_basis(kind kd, uint32_t ig, uint32_t stream, const xkv_floats & rows, const layout * next, int n_thread) {
    if (next) {
        write_basis(next->groups, next->bases, kd, ig, rows, n_thread);
        return;
    }
    changed = changed || !own[stream];
    write_basis(now.groups, bases_of(stream), kd, ig, rows, n_thread);
}

void xkv_store::own_bases(uint32_t stream) {
    // a single stream changes the calibrated bases in place: the sidecar has them still
    if (n_stream == 1 || own[stream]) {
        return;
    }
    size_t n = layer_list.size();
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
    for (size_t i = 0; i < src.packed.size(); ++i) {
        if (src.packed[i]) {
            ggml_backend_tensor_copy(src.packed[i], dst.packed[i]);
        }
    }
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
    if (no_alloc || stages[l.stage].plain()) {
        return;
    }
    for (uint32_t ig = 0; ig < l.groups.size(); ++ig) {
        for (auto kd : kinds(ig)) {
            write_basis(l.groups, l.bases, kd, ig, sidecar.basis(ig, kd, l.groups[ig].rank[kd]), 1);
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
            const layer & l = layer_of(il);
            ggml_backend_tensor_set(l.mean_k, mean_k.data() + l.off[kind::K], 0, ggml_nbytes(l.mean_k));
            if (l.v_in_k) {
                continue; // comes back with the sum of coefficients
            }
            const float *  v          = mean_v.data() + l.off[kind::V];
            const uint32_t n_head_dim = hparams.n_embd_head_v(il);

            // weights of the values sum to one without sinks only, and then the mean comes back once
            if (model.layers[il].attn_sinks && std::any_of(v, v + hparams.n_embd_v_gqa(il), [](float x) { return x != 0.0f; })) {
                xkv_throw(XKV_STATUS_MODEL_MISMATCH,
                          "sidecar %s has a mean of V of layer %u, expected none for a model with sink logits; run xkv-gguf convert again",
                          sidecar.path.c_str(), il);
            }

            xkv_floats mean_o;
            for (uint32_t h = 0; h < hparams.n_head(il); ++h) {
                const float * head = v + (size_t) (h / hparams.n_gqa(il)) * n_head_dim;
                mean_o.insert(mean_o.end(), head, head + n_head_dim);
            }
            ggml_backend_tensor_set(l.mean_v, v, 0, ggml_nbytes(l.mean_v));
            ggml_backend_tensor_set(l.mean_o, mean_o.data(), 0, ggml_nbytes(l.mean_o));
        }
    }
}

ggml_tensor * xkv_transposed_f32(ggml_context * ctx, ggml_tensor * basis) {
    basis = basis->type == GGML_TYPE_F32 ? basis : ggml_cast(ctx, basis, GGML_TYPE_F32);
    return ggml_cont(ctx, ggml_transpose(ctx, basis));
}

ggml_tensor * xkv_from_coef(ggml_context * ctx, xkv_store::kind kd, ggml_tensor * basis, ggml_tensor * coef) {
    return ggml_mul_mat(ctx, kd == xkv_store::kind::K ? xkv_transposed_f32(ctx, basis) : basis, coef);
}
