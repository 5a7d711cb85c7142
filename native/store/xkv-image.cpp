// What of the store a saved state holds, as the bytes that stand there: coefficients by chunk, a stream's bases, and what both mean.

#include "store/xkv-store.h"

#include "ggml-backend.h"

#include <algorithm>

std::vector<uint32_t> xkv_store::signature(uint32_t stage) const {
    const layout l = make_layout(stage, n_chunk);

    std::vector<uint32_t> res = { n_chunk, (uint32_t) l.groups.size(), stages[stage].plain() };
    for (const auto & gr : l.groups) {
        res.push_back(gr.pack);
        res.insert(res.end(), gr.layers.begin(), gr.layers.end());
        for (auto kd : { kind::K, kind::V }) {
            res.push_back(gr.dim[kd]);
            for (const auto & seg : gr.segments[kd]) {
                res.insert(res.end(), { (uint32_t) seg.type, (uint32_t) seg.type_basis, seg.rank });
            }
        }
    }
    return res;
}

size_t xkv_store::chunk_bytes() const {
    size_t res = 0;
    for (const auto & gr : now.groups) {
        if (gr.packed) {
            res += gr.packed->nb[1];
            continue;
        }
        for (auto kd : { kind::K, kind::V }) {
            for (const auto & seg : gr.segments[kd]) {
                res += ggml_row_size(seg.type, (int64_t) n_chunk * seg.rank);
            }
        }
    }
    return res;
}

// f(tensor, offset, bytes of a row, rows, bytes between them): where a chunk's coefficients are
template <typename F> void xkv_store::each_piece(uint32_t stream, uint32_t ic, F && f) const {
    for (const auto & gr : now.groups) {
        if (gr.packed) {
            f(gr.packed, stream * gr.packed->nb[2] + ic * gr.packed->nb[1], gr.packed->nb[1], (size_t) 1, gr.packed->nb[1]);
            continue;
        }
        for (auto kd : { kind::K, kind::V }) {
            for (const auto & seg : gr.segments[kd]) {
                ggml_tensor * t = seg.coef;
                if (kd == kind::K) {
                    const size_t n = ggml_row_size(t->type, (int64_t) n_chunk * seg.rank);
                    f(t, stream * t->nb[2] + ic * n, n, (size_t) 1, n);
                } else {
                    const size_t n = ggml_row_size(t->type, n_chunk);
                    f(t, stream * t->nb[2] + ic * n, n, (size_t) seg.rank, t->nb[1]);
                }
            }
        }
    }
}

void xkv_store::get_chunk(uint32_t stream, uint32_t ic, uint8_t * data) const {
    each_piece(stream, ic, [&](ggml_tensor * t, size_t at, size_t n, size_t n_row, size_t stride) {
        ggml_backend_tensor_get_2d(t, data, at, n, n_row, stride, n);
        data += n * n_row;
    });
}

void xkv_store::set_chunk(uint32_t stream, uint32_t ic, const uint8_t * data) const {
    each_piece(stream, ic, [&](ggml_tensor * t, size_t at, size_t n, size_t n_row, size_t stride) {
        ggml_backend_tensor_set_2d(t, data, at, n, n_row, stride, n);
        data += n * n_row;
    });
}

std::vector<ggml_tensor *> xkv_store::basis_tensors(uint32_t stream) const {
    std::vector<ggml_tensor *> res;
    if (plain()) {
        return res;
    }
    const auto & set = bases_of(stream);
    std::copy_if(set.packed.begin(), set.packed.end(), std::back_inserter(res), [](const ggml_tensor * t) { return t != nullptr; });
    for (auto kd : { kind::K, kind::V }) {
        for (const auto & list : set.tensors[kd]) {
            res.insert(res.end(), list.begin(), list.end());
        }
    }
    return res;
}

bool xkv_store::has_own_bases(uint32_t stream) const {
    return !plain() && (own[stream] || (n_stream == 1 && changed));
}

size_t xkv_store::basis_bytes() const {
    size_t res = 0;
    for (const auto * t : basis_tensors(0)) {
        res += ggml_nbytes(t);
    }
    return res;
}

void xkv_store::get_bases(uint32_t stream, uint8_t * data) const {
    for (auto * t : basis_tensors(stream)) {
        ggml_backend_tensor_get(t, data, 0, ggml_nbytes(t));
        data += ggml_nbytes(t);
    }
}

void xkv_store::set_bases(uint32_t stream, const uint8_t * data) {
    own_bases(stream);
    changed = changed || !own[stream];
    for (auto * t : basis_tensors(stream)) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        data += ggml_nbytes(t);
    }
}
