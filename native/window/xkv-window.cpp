#include "window/xkv-window.h"

#include "base/xkv-error.h"

#include "llama-model.h"

#include <algorithm>

xkv_window::xkv_window(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
                       const xkv_layers & layers, uint32_t n_cell) {
    const auto filter = [&](int32_t il) {
        return std::binary_search(layers.held.begin(), layers.held.end(), (uint32_t) il) || layers.shared.count(il) > 0;
    };
    const auto from = [&](int32_t il) {
        const auto it = layers.shared.find(il);
        return it == layers.shared.end() ? -1 : (int32_t) it->second;
    };

    kv = std::make_unique<llama_kv_cache>(model, model.hparams, params.type_k, params.type_v, /*v_trans =*/false, cparams.offload_kqv,
                                          cparams.kv_unified, n_cell, cparams.n_seq_max, 1, 0, LLAMA_SWA_TYPE_NONE, nullptr, filter, from,
                                          nullptr, "xkv_window_");

    // upstream turns K and V of quantized caches by a Hadamard matrix; compression needs them as they are
    kv->attn_rot_k = false;
    kv->attn_rot_v = false;

    sinks.assign(kv->get_n_stream(), std::vector<bool>(size(), false));
}

llama_kv_cells & xkv_window::cells(uint32_t stream) const {
    return kv->v_cells[stream];
}

ggml_tensor * xkv_window::k(uint32_t il, uint32_t stream) const {
    return kv->layers[kv->map_layer_ids.at(il)].k_stream[stream];
}

ggml_tensor * xkv_window::v(uint32_t il, uint32_t stream) const {
    return kv->layers[kv->map_layer_ids.at(il)].v_stream[stream];
}

std::vector<xkv_token> xkv_window::tokens(llama_seq_id seq_id) const {
    const uint32_t stream = get_stream(seq_id);

    std::vector<xkv_token> res;
    for (const auto & [pos, cell] : cells(stream).seq_pos_get(seq_id)) {
        res.push_back({ pos, cell, cells(stream).seq_get_all(cell), sinks[stream][cell] });
    }
    return res;
}

uint32_t xkv_window::n_free(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & wcells = cells(get_stream(seq_id));

    uint32_t n = 0;
    for (uint32_t i = 0; i < wcells.size(); ++i) {
        n += wcells.is_empty(i) || (wcells.seq_count(i) == 1 && wcells.seq_has(i, seq_id) && wcells.pos_in(i, p0, p1));
    }
    return n;
}

std::vector<uint32_t> xkv_window::free_cells(uint32_t stream, size_t n) const {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < size() && res.size() < n; ++i) {
        if (cells(stream).is_empty(i)) {
            res.push_back(i);
        }
    }
    if (res.size() < n) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "the window of %u tokens has no room for the rest of a cut chunk", size());
    }
    return res;
}

void xkv_window::put(uint32_t stream, uint32_t cell, llama_pos pos, llama_seq_id seq_id) {
    cells(stream).pos_set(cell, pos);
    cells(stream).seq_add(cell, seq_id);
}

void xkv_window::share(uint32_t stream, const std::vector<uint32_t> & list, const xkv_seq_set & seqs) {
    for (llama_seq_id seq_id = 0; seq_id < (llama_seq_id) seqs.size(); ++seq_id) {
        for (uint32_t cell : list) {
            if (seqs.test(seq_id) && !cells(stream).seq_has(cell, seq_id)) {
                cells(stream).seq_add(cell, seq_id);
            }
        }
    }
}

void xkv_window::remove(uint32_t stream, const std::vector<uint32_t> & list) {
    for (uint32_t cell : list) {
        cells(stream).rm(cell);
    }
    kv->v_heads[stream] = 0;
}

void xkv_window::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    auto & wcells = cells(get_stream(seq_id));
    for (uint32_t i = 0; i < wcells.size(); ++i) {
        if (wcells.pos_in(i, p0, p1) && wcells.seq_has(i, seq_id)) {
            wcells.pos_add(i, wcells.pos_get(i) / d - wcells.pos_get(i));
        }
    }
}

std::vector<std::pair<uint32_t, llama_pos>> xkv_window::take_shift(uint32_t stream) {
    auto & wcells = cells(stream);

    std::vector<std::pair<uint32_t, llama_pos>> res;
    for (uint32_t i = 0; i < wcells.size(); ++i) {
        if (!wcells.is_empty(i) && wcells.get_shift(i) != 0) {
            res.emplace_back(i, wcells.get_shift(i));
        }
    }
    wcells.reset_shift();
    return res;
}

uint32_t xkv_window::n_sink(llama_seq_id seq_id) const {
    const uint32_t stream = get_stream(seq_id);

    uint32_t n = 0;
    for (uint32_t i = 0; i < size(); ++i) {
        n += sinks[stream][i] && cells(stream).seq_has(i, seq_id);
    }
    return n;
}

void xkv_window::drop_sinks() {
    for (uint32_t s = 0; s < sinks.size(); ++s) {
        for (uint32_t i = 0; i < size(); ++i) {
            sinks[s][i] = sinks[s][i] && !cells(s).is_empty(i);
        }
    }
}

void xkv_window::copy(llama_context * lctx, llama_seq_id src, llama_seq_id dst) {
    llama_synchronize(lctx);
    kv->seq_cp(src, dst, -1, -1);
    // copied now: what follows may cut a chunk and write to the window
    const auto update = kv->init_update(lctx, false);
    if (update->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
        update->apply();
    }
    sinks[get_stream(dst)] = sinks[get_stream(src)];
}
