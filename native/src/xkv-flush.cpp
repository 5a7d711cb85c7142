#include "xkv-flush.h"

#include "xkv-cache.h"
#include "xkv-frame.h"

#include "llama-model.h"

#include <algorithm>
#include <map>

// V coefficients are read and written in rows of one quantization block
static const uint32_t XKV_V_ROW = 32;

size_t xkv_flush::n_node() const {
    return 64 + 48*cache.store->layers.size();
}

ggml_tensor * xkv_flush::input_v_rows(ggml_type type, const std::vector<uint32_t> & ics, uint32_t rank) {
    const uint32_t n_blk_slot  = cache.store->n_slot/XKV_V_ROW;
    const uint32_t n_blk_chunk = cache.store->n_chunk/XKV_V_ROW;

    std::vector<int64_t> rows;
    for (uint32_t r = 0; r < rank; ++r) {
        for (uint32_t ic : ics) {
            for (uint32_t b = 0; b < n_blk_chunk; ++b) {
                rows.push_back((int64_t) r*n_blk_slot + ic*n_blk_chunk + b);
            }
        }
    }
    return graph.input(type, std::move(rows));
}

static ggml_tensor * xkv_v_rows(ggml_context * ctx, ggml_tensor * coef_v) {
    return ggml_reshape_2d(ctx, coef_v, XKV_V_ROW, ggml_nelements(coef_v)/XKV_V_ROW);
}

void xkv_flush::compress(llama_context * lctx, uint32_t stream, const std::vector<job> & jobs) {
    // bounded scratch, whatever the number of tokens
    const size_t n_block = std::max<size_t>(1, cache.config.n_block/cache.store->n_chunk);
    for (size_t i = 0; i < jobs.size(); i += n_block) {
        compress_block(lctx, stream, jobs.data() + i, std::min(n_block, jobs.size() - i));
    }
}

void xkv_flush::compress_block(llama_context * lctx, uint32_t stream, const job * jobs, size_t n_job) {
    const auto & store   = *cache.store;
    const auto & hparams = cache.model.hparams;

    const uint32_t n_chunk = store.n_chunk;
    const uint32_t n       = n_job*n_chunk;

    std::vector<int64_t>  cells;
    std::vector<int64_t>  origin;
    std::vector<int64_t>  slots;
    std::vector<uint32_t> ics;
    for (size_t j = 0; j < n_job; ++j) {
        ics.push_back(jobs[j].ic);
        for (uint32_t i = 0; i < n_chunk; ++i) {
            // slots beyond the last token of a chunk repeat it: their values are finite and masked
            cells .push_back(jobs[j].cells[std::min<size_t>(i, jobs[j].cells.size() - 1)]);
            origin.push_back(-jobs[j].pos);
            slots .push_back((int64_t) jobs[j].ic*n_chunk + i);
        }
    }

    graph.begin(lctx, n_node());

    ggml_context * ctx = graph.ctx();

    ggml_tensor * inp_cells  = graph.input(GGML_TYPE_I32, cells);
    ggml_tensor * inp_origin = graph.input(GGML_TYPE_I32, origin);
    ggml_tensor * inp_slots  = graph.input(GGML_TYPE_I64, slots);

    std::map<uint32_t, ggml_tensor *> inp_rows; // by rank

    for (const auto & gr : store.groups) {
        ggml_tensor * coef_k = nullptr; // [rank_k, n]
        ggml_tensor * coef_v = nullptr; // [n, rank_v]

        for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
            const auto & l = store.layers[il];

            ggml_tensor * k = ggml_get_rows(ctx, cache.window_k(il, stream), inp_cells); // [n_embd_k, n]
            k = ggml_reshape_3d(ctx, k, hparams.n_embd_head_k(il), hparams.n_head_kv(il), n);
            k = xkv_rotate(ctx, cache.model, cache.cparams, il, k, inp_origin);
            k = ggml_reshape_2d(ctx, k, l.mean_k->ne[0], n);
            k = ggml_sub(ctx, k, l.mean_k);

            ggml_tensor * basis_k = ggml_view_2d(ctx, l.basis_k, l.basis_k->ne[0], gr.rank[0], l.basis_k->nb[1], 0);

            k      = ggml_mul_mat(ctx, basis_k, k);
            coef_k = coef_k ? ggml_add(ctx, coef_k, k) : k;

            // the window holds centred V
            ggml_tensor * v = ggml_cont(ctx, ggml_transpose(ctx, cache.window_v(ctx, il, stream)));
            v = ggml_get_rows(ctx, v, inp_cells); // [n_embd_v, n]

            ggml_tensor * basis_v = ggml_cont(ctx, ggml_transpose(ctx, l.basis_v)); // [n_embd_v, rank_v]
            if (basis_v->type != GGML_TYPE_F32) {
                basis_v = ggml_cast(ctx, basis_v, GGML_TYPE_F32);
            }
            v      = ggml_mul_mat(ctx, v, basis_v);
            coef_v = coef_v ? ggml_add(ctx, coef_v, v) : v;
        }

        graph.expand(ggml_set_rows(ctx, gr.coef_k_stream[stream], coef_k, inp_slots));

        ggml_tensor *& rows = inp_rows[gr.rank[1]];
        rows   = rows ? rows : input_v_rows(GGML_TYPE_I64, ics, gr.rank[1]);
        coef_v = ggml_reshape_2d(ctx, coef_v, XKV_V_ROW, (int64_t) (n/XKV_V_ROW)*gr.rank[1]);
        graph.expand(ggml_set_rows(ctx, xkv_v_rows(ctx, gr.coef_v_stream[stream]), coef_v, rows));
    }

    graph.run();
}

void xkv_flush::restore(llama_context * lctx, uint32_t stream, uint32_t ic, llama_pos pos, const std::vector<uint32_t> & offsets,
                        const std::vector<uint32_t> & cells) {
    const auto & store   = *cache.store;
    const auto & hparams = cache.model.hparams;

    const uint32_t n_chunk = store.n_chunk;
    const uint32_t n       = offsets.size();
    const uint32_t n_cell  = cache.get_window()->get_size();

    std::vector<int64_t> slots;
    for (uint32_t off : offsets) {
        slots.push_back((int64_t) ic*n_chunk + off);
    }

    graph.begin(lctx, n_node());

    ggml_context * ctx = graph.ctx();

    ggml_tensor * inp_slots   = graph.input(GGML_TYPE_I32, slots);
    ggml_tensor * inp_offsets = graph.input(GGML_TYPE_I32, std::vector<int64_t>(offsets.begin(), offsets.end()));
    ggml_tensor * inp_origin  = graph.input(GGML_TYPE_I32, std::vector<int64_t>(n, pos));
    ggml_tensor * inp_cells   = graph.input(GGML_TYPE_I64, std::vector<int64_t>(cells.begin(), cells.end()));

    std::map<uint32_t, ggml_tensor *> inp_rows;   // by rank
    std::map<uint32_t, ggml_tensor *> inp_v_idxs; // by n_embd_v: single elements of the transposed window

    for (const auto & gr : store.groups) {
        ggml_tensor * coef_k = ggml_get_rows(ctx, gr.coef_k_stream[stream], inp_slots); // [rank_k, n]

        ggml_tensor *& rows = inp_rows[gr.rank[1]];
        rows = rows ? rows : input_v_rows(GGML_TYPE_I32, { ic }, gr.rank[1]);

        ggml_tensor * coef_v = ggml_get_rows(ctx, xkv_v_rows(ctx, gr.coef_v_stream[stream]), rows);
        coef_v = ggml_reshape_2d(ctx, coef_v, n_chunk, gr.rank[1]);
        coef_v = ggml_cont(ctx, ggml_transpose(ctx, coef_v));   // [rank_v, n_chunk]
        coef_v = ggml_get_rows(ctx, coef_v, inp_offsets);       // [rank_v, n]

        for (uint32_t il = gr.first; il < gr.first + gr.count; ++il) {
            const auto & l = store.layers[il];

            ggml_tensor * basis_k = ggml_view_2d(ctx, l.basis_k, l.basis_k->ne[0], gr.rank[0], l.basis_k->nb[1], 0);
            basis_k = ggml_cont(ctx, ggml_transpose(ctx, basis_k));

            ggml_tensor * k = ggml_add(ctx, ggml_mul_mat(ctx, basis_k, coef_k), l.mean_k);
            k = ggml_reshape_3d(ctx, k, hparams.n_embd_head_k(il), hparams.n_head_kv(il), n);
            k = xkv_rotate(ctx, cache.model, cache.cparams, il, k, inp_origin);
            k = ggml_reshape_2d(ctx, k, l.mean_k->ne[0], n);
            graph.expand(ggml_set_rows(ctx, cache.window_k(il, stream), k, inp_cells));

            const int64_t n_embd_v = l.mean_v->ne[0];

            ggml_tensor *& v_idxs = inp_v_idxs[n_embd_v];
            if (!v_idxs) {
                std::vector<int64_t> idxs;
                for (uint32_t cell : cells) {
                    for (int64_t i = 0; i < n_embd_v; ++i) {
                        idxs.push_back(i*n_cell + cell);
                    }
                }
                v_idxs = graph.input(GGML_TYPE_I64, std::move(idxs));
            }
            ggml_tensor * v   = ggml_mul_mat(ctx, l.basis_v, coef_v); // [n_embd_v, n]
            ggml_tensor * dst = cache.window_v(ctx, il, stream);
            dst = ggml_reshape_2d(ctx, dst, 1, ggml_nelements(dst));
            graph.expand(ggml_set_rows(ctx, dst, ggml_reshape_2d(ctx, v, 1, ggml_nelements(v)), v_idxs));
        }
    }

    graph.run();
}
