// What of the store a saved state holds, as the bytes that stand there: coefficients by chunk, a stream's bases, and what both mean.

#include "base/xkv-error.h"
#include "store/xkv-store.h"

#include "ggml-backend.h"

#include <algorithm>
#include <initializer_list>

std::vector<uint32_t> xkv_store::signature(uint32_t stage) const {
    const layout l = make_layout(stage, n_chunk);

    std::vector<uint32_t> res = { n_chunk, (uint32_t) l.groups.size(), stages[stage].plain() };
    for (const auto & gr : l.groups) {
        res.insert(res.end(), { gr.pack, (uint32_t) gr.layers.size() });
        res.insert(res.end(), gr.layers.begin(), gr.layers.end());
        for (auto kd : { kind::K, kind::V }) {
            res.insert(res.end(), { gr.dim[kd], (uint32_t) gr.segments[kd].size() });
            for (const auto & seg : gr.segments[kd]) {
                res.insert(res.end(), { (uint32_t) seg.type, (uint32_t) seg.type_basis, seg.rank });
            }
        }
    }
    return res;
}

namespace {

// reads what signature() gives; throws xkv_error where that ends too early
class signature_reader {
public:
    explicit signature_reader(const std::vector<uint32_t> & list) : list(list) {}

    uint32_t next() {
        if (at == list.size()) {
            xkv_throw(XKV_STATUS_FORMAT, "a saved state describes its stage in %zu numbers, expected more", list.size());
        }
        return list[at++];
    }

    ggml_type type(std::initializer_list<ggml_type> allowed) {
        const uint32_t t     = next(); // no enumerator before it is known to be one
        const auto     known = std::find_if(allowed.begin(), allowed.end(), [&](ggml_type a) { return (uint32_t) a == t; });
        if (known == allowed.end()) {
            xkv_throw(XKV_STATUS_FORMAT, "a saved state has numbers of type %u, which no store has", t);
        }
        return *known;
    }

private:
    const std::vector<uint32_t> & list;
    size_t                        at = 0;
};

} // namespace

// the stage that a signature describes, and whether any group is packed
static std::pair<xkv_config::stage, bool> xkv_parse_signature(const std::vector<uint32_t> & signature, const xkv_sidecar & sidecar) {
    signature_reader in(signature);

    std::pair<xkv_config::stage, bool> res = { {}, false };
    auto & [stage, packed]                 = res;

    const uint32_t frame   = in.next();
    const uint32_t n_group = in.next();
    const bool     plain   = in.next() != 0;
    if (frame != sidecar.frame || n_group != sidecar.groups.size()) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state has %u groups of layers and chunks of %u tokens, this cache has %zu and %u",
                  n_group, frame, sidecar.groups.size(), sidecar.frame);
    }
    for (uint32_t ig = 0; ig < n_group; ++ig) {
        packed = in.next() != 0 || packed;
        for (uint32_t n = in.next(); n > 0; --n) {
            in.next();
        }
        for (auto kd : { xkv_store::kind::K, xkv_store::kind::V }) {
            in.next();
            std::vector<xkv_config::segment> list;
            for (uint32_t n = in.next(); n > 0; --n) {
                const auto type = in.type(
                    { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0, GGML_TYPE_Q1_0 });
                const auto type_basis =
                    in.type({ GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0, GGML_TYPE_Q4_0, GGML_TYPE_COUNT });
                const uint32_t rank = in.next();
                if (plain != (type_basis == GGML_TYPE_COUNT) || rank == 0 || rank > sidecar.groups[ig].dim[kd] + 256) {
                    xkv_throw(XKV_STATUS_FORMAT, "a saved state has %u directions of group %u, expected up to %u", rank, ig,
                              sidecar.groups[ig].dim[kd]);
                }
                list.push_back({ rank, type, type_basis, 0.0f });
            }
            if (plain && !list.empty()) {
                stage.type = list[0].type;
            }
            if (!plain) {
                stage.segments[kd].push_back(std::move(list));
            }
        }
    }
    return res;
}

std::unique_ptr<xkv_store> xkv_store::image(const std::vector<uint32_t> & signature, size_t n) const {
    auto [one, packed] = xkv_parse_signature(signature, sidecar);

    xkv_config config = {};
    config.n_slot     = std::max<size_t>(1, n) * n_chunk;
    config.fused      = packed ? XKV_FUSED_CPU | XKV_FUSED_RPC | XKV_FUSED_OTHER : 0;
    config.stages.push_back(std::move(one));

    auto res = std::make_unique<xkv_store>(model, sidecar, config, xkv_layers(), 1, /*offload =*/false);
    if (res->signature(0) != signature) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state's groups of layers, or where they are packed, are not those of this cache; load it "
                                             "into a context with the layers and devices of the one that saved it");
    }
    return res;
}

size_t xkv_store::chunk_bytes(uint32_t stage) const {
    size_t res = 0;
    for (const auto & gr : make_layout(stage, n_chunk).groups) {
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

static std::vector<ggml_tensor *> xkv_basis_tensors(const xkv_store::basis_set & set) {
    std::vector<ggml_tensor *> res;
    std::copy_if(set.packed.begin(), set.packed.end(), std::back_inserter(res), [](const ggml_tensor * t) { return t != nullptr; });
    for (auto kd : { xkv_store::kind::K, xkv_store::kind::V }) {
        for (const auto & list : set.tensors[kd]) {
            res.insert(res.end(), list.begin(), list.end());
        }
    }
    return res;
}

std::vector<ggml_tensor *> xkv_store::basis_tensors(uint32_t stream) const {
    return plain() ? std::vector<ggml_tensor *>() : xkv_basis_tensors(bases_of(stream));
}

bool xkv_store::has_own_bases(uint32_t stream) const {
    return !plain() && (own[stream] || (n_stream == 1 && changed));
}

size_t xkv_store::basis_bytes(uint32_t stage) const {
    const layout l   = make_layout(stage, n_chunk); // its tensors live as long as it does
    size_t       res = 0;
    for (const auto * t : xkv_basis_tensors(l.bases)) {
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
