// The window's tokens in a saved state: positions, sequences and rows of K and V, in the order of their cells.

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "window/xkv-window.h"

#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

// f(index of the first, its cell, how many) for cells that follow each other
template <typename F> static void xkv_each_run(const std::vector<uint32_t> & cells, F && f) {
    for (size_t i = 0; i < cells.size();) {
        size_t n = 1;
        while (i + n < cells.size() && cells[i + n] == cells[i] + n) {
            n++;
        }
        f(i, cells[i], n);
        i += n;
    }
}

template <typename F> void xkv_window::each_tensor(uint32_t stream, F && f) const {
    for (const auto & layer : kv->layers) {
        f(layer.il, layer.k_stream[stream]);
        if (layer.v_stream[stream]) {
            f(layer.il, layer.v_stream[stream]);
        }
    }
}

void xkv_window::save(uint32_t stream, llama_seq_id seq_id, xkv_bytes_out & out) const {
    const auto & wcells = cells(stream);

    std::vector<uint32_t> list;
    for (uint32_t i = 0; i < size(); ++i) {
        if (!wcells.is_empty(i) && (seq_id < 0 || wcells.seq_has(i, seq_id))) {
            list.push_back(i);
        }
    }

    std::vector<xkv_saved_token> tokens;
    for (uint32_t i : list) {
        tokens.push_back({ i, wcells.pos_get(i), sinks[stream][i], wcells.ext_get(i), wcells.seq_get_all(i) });
        if (seq_id >= 0) {
            tokens.back().seqs = xkv_seq_set().set(seq_id);
        }
    }
    out.put((uint32_t) tokens.size());
    out.put(list.size() == n_used(stream) ? kv->v_heads[stream] : 0u); // of a window that others use, it is not the sequence's
    for (const auto & token : tokens) {
        out.put(token.cell);
        out.put(token.pos);
        out.put((uint8_t) token.sink);
        out.put(token.ext);
        out.put(token.seqs);
    }
    each_tensor(stream, [&](uint32_t il, const ggml_tensor * t) {
        out.put(il);
        out.put((uint32_t) t->type);
        out.put((uint64_t) t->nb[1]);
        xkv_each_run(list, [&](size_t, uint32_t cell, size_t n) {
            ggml_backend_tensor_get(t, out.more(n * t->nb[1]), cell * t->nb[1], n * t->nb[1]);
        });
    });
}

xkv_saved_tokens xkv_window::parse(xkv_bytes_in & in, uint32_t n_seq_max) const {
    xkv_saved_tokens res;
    const auto       n = in.get<uint32_t>();
    res.head           = in.get<uint32_t>();
    for (uint32_t i = 0; i < n; ++i) {
        xkv_saved_token token;
        token.cell = in.get<uint32_t>();
        token.pos  = in.get<llama_pos>();
        token.sink = in.get<uint8_t>() != 0;
        token.ext  = in.get<llama_kv_cell_ext>();
        token.seqs = in.get<xkv_seq_set>();
        if (token.pos < 0 || token.pos > (1 << 30) || token.seqs.none() || (token.seqs >> n_seq_max).any()) {
            xkv_throw(XKV_STATUS_FORMAT, "token %u of the state has position %d, expected one from 0 on, of sequences below %u", i,
                      token.pos, n_seq_max);
        }
        res.tokens.push_back(token);
    }
    each_tensor(0, [&](uint32_t il, const ggml_tensor * t) {
        const auto layer  = in.get<uint32_t>();
        const auto number = in.get<uint32_t>();
        const auto type   = number < GGML_TYPE_COUNT ? (ggml_type) number : GGML_TYPE_COUNT;
        const auto n_byte = in.get<uint64_t>();
        const bool known  = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_Q8_0;
        if (layer != il || !known || t->ne[0] % xkv_block_size(type) != 0 || n_byte != ggml_row_size(type, t->ne[0])) {
            xkv_throw(XKV_STATUS_MODEL_MISMATCH,
                      "the state has rows of layer %u, %llu bytes each, expected rows of layer %u of %lld numbers", layer,
                      (unsigned long long) n_byte, il, (long long) t->ne[0]);
        }
        res.rows.push_back({ type, (size_t) n_byte, in.take(n * n_byte) });
    });
    return res;
}

bool xkv_window::has_places(uint32_t stream, const xkv_saved_tokens & saved, const std::vector<uint32_t> & which) const {
    std::vector<bool> taken(size(), false);
    return std::all_of(which.begin(), which.end(), [&](uint32_t i) {
        const uint32_t cell             = saved.tokens[i].cell;
        const bool     free             = cell < size() && cells(stream).is_empty(cell) && !taken[cell];
        taken[cell < size() ? cell : 0] = true;
        return free;
    });
}

void xkv_window::load(uint32_t stream, const xkv_saved_tokens & saved, const std::vector<uint32_t> & which, llama_seq_id seq_id) {
    const bool same   = has_places(stream, saved, which);
    auto       list   = same ? std::vector<uint32_t>() : free_cells(stream, which.size());
    auto &     wcells = cells(stream);
    for (size_t j = 0; same && j < which.size(); ++j) {
        list.push_back(saved.tokens[which[j]].cell);
    }

    size_t i = 0;
    each_tensor(stream, [&](uint32_t, ggml_tensor * t) {
        const auto & rows = saved.rows[i++];

        std::vector<float>   x(t->ne[0]);
        std::vector<uint8_t> made(which.size() * t->nb[1]); // rows in the order of the cells, of this window's type
        for (size_t j = 0; j < which.size(); ++j) {
            const uint8_t * from = rows.data + which[j] * rows.n_byte;
            if (rows.type == t->type) {
                memcpy(made.data() + j * t->nb[1], from, rows.n_byte);
            } else {
                xkv_decode(rows.type, from, x.data(), x.size());
                xkv_encode(t->type, x.data(), made.data() + j * t->nb[1], x.size());
            }
        }
        xkv_each_run(list, [&](size_t at, uint32_t cell, size_t n) {
            ggml_backend_tensor_set(t, made.data() + at * t->nb[1], cell * t->nb[1], n * t->nb[1]);
        });
    });
    for (size_t j = 0; j < which.size(); ++j) {
        const auto & token = saved.tokens[which[j]];
        wcells.pos_set(list[j], token.pos);
        wcells.ext_set(list[j], token.ext);
        if (seq_id >= 0) {
            wcells.seq_add(list[j], seq_id);
        } else {
            share(stream, { list[j] }, token.seqs);
        }
        if (token.sink) {
            set_sink(stream, list[j]);
        }
    }
    kv->v_heads[stream] = same && saved.head < size() ? saved.head : 0;
}
