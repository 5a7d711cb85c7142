// Attention over store and window. Two paths that compute the same:
//   materialized: K and V of the stored tokens are rebuilt for one layer, then flash attention (many queries)
//   absorbed:     queries go to the chunks' frames and through the basis, and meet the coefficients (few queries)

#include "xkv-attn.h"

#include "xkv-cache.h"
#include "xkv-error.h"
#include "xkv-frame.h"
#include "xkv-hooks.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <cmath>
#include <cstring>

//
// llm_graph_input_xkv
//

llm_graph_input_xkv::llm_graph_input_xkv(const llama_kv_cache_xkv_context * mctx, bool absorb) :
    mctx(mctx), n_slot(mctx->get_n_slot()), absorb(absorb) {}

void llm_graph_input_xkv::set_input(const llama_ubatch * ubatch) {
    const auto & xkv = *mctx->xkv;

    const uint32_t n_chunk  = xkv.store->n_chunk;
    const uint32_t n_stream = mctx->get_n_stream();

    if (origin && origin->buffer) {
        std::vector<int32_t> data;
        data.reserve(origin->ne[0]);
        for (uint32_t s = 0; s < n_stream; ++s) {
            const auto & chunks = xkv.get_chunks(mctx->get_stream_0() + s);
            for (uint32_t ic = 0; ic < n_slot/n_chunk; ++ic) {
                const llama_pos pos = ic < chunks.size() && chunks[ic].n > 0 ? chunks[ic].pos : 0;
                data.insert(data.end(), absorb ? 1 : n_chunk, absorb ? -pos : pos);
            }
            data.resize((size_t) (s + 1)*origin->ne[0]/n_stream, 0);
        }
        ggml_backend_tensor_set(origin, data.data(), 0, ggml_nbytes(origin));
    }

    if (mask && mask->buffer) {
        const uint32_t n_tps = ubatch->n_tokens/n_stream;

        const ggml_fp16_t keep = ggml_fp32_to_fp16(0.0f);
        const ggml_fp16_t drop = ggml_fp32_to_fp16(-INFINITY);

        std::vector<ggml_fp16_t> data(ggml_nelements(mask), drop);
        for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
            const llama_seq_id seq_id = ubatch->seq_id[i][0];

            ggml_fp16_t * row = data.data() + (size_t) i*n_slot;
            if (i % n_tps > 0 && ubatch->seq_id[i - 1][0] == seq_id) {
                memcpy(row, row - n_slot, n_slot*sizeof(*row)); // a stored token is older than every query of its sequence
                continue;
            }
            const auto & chunks = xkv.get_chunks(xkv.get_stream(seq_id));
            for (uint32_t ic = 0; ic < std::min<size_t>(n_slot/n_chunk, chunks.size()); ++ic) {
                if (chunks[ic].seqs.test(seq_id)) {
                    std::fill_n(row + ic*n_chunk, chunks[ic].n, keep);
                }
            }
        }
        ggml_backend_tensor_set(mask, data.data(), 0, ggml_nbytes(mask));
    }
}

bool llm_graph_input_xkv::can_reuse(const llm_graph_params & params) {
    mctx = static_cast<const llama_kv_cache_context *>(params.mctx)->as_xkv();

    // the shape of the micro-batch is checked by the input of the window
    return mctx->get_n_slot() == n_slot;
}

//
// graph
//

static llm_graph_input_xkv * xkv_get_input(const llm_graph_context & gctx, const llama_kv_cache_xkv_context * mctx) {
    for (auto & inp : gctx.res->inputs) {
        if (auto * res = dynamic_cast<llm_graph_input_xkv *>(inp.get())) {
            return res;
        }
    }

    const uint32_t n_stream = mctx->get_n_stream();
    const uint32_t n_tps    = gctx.n_tokens/n_stream;

    auto inp = std::make_unique<llm_graph_input_xkv>(mctx, n_tps <= mctx->xkv->config.n_absorb && (n_stream == 1 || n_tps == 1));
    if (inp->n_slot > 0) {
        const uint32_t n_origin = inp->absorb ? inp->n_slot/mctx->xkv->store->n_chunk : inp->n_slot;

        inp->origin = ggml_new_tensor_1d(gctx.ctx0, GGML_TYPE_I32, (int64_t) n_origin*n_stream);
        ggml_set_input(inp->origin);
        ggml_set_name(inp->origin, "xkv_inp_origin");

        inp->mask = ggml_new_tensor_4d(gctx.ctx0, GGML_TYPE_F16, inp->n_slot, n_tps, 1, n_stream);
        ggml_set_input(inp->mask);
        ggml_set_name(inp->mask, "xkv_inp_mask");
    }
    return (llm_graph_input_xkv *) gctx.res->add_input(std::move(inp));
}

// coefficients of the streams of the micro-batch: K [rank_k, n_slot, n_stream], V [n_slot, rank_v, n_stream]
static ggml_tensor * xkv_view_coef_k(ggml_context * ctx, const llama_kv_cache_xkv_context * mctx, const xkv_store::group & gr) {
    ggml_tensor * t = gr.coef_k;
    return ggml_view_3d(ctx, t, t->ne[0], mctx->get_n_slot(), mctx->get_n_stream(), t->nb[1], t->nb[2], mctx->get_stream_0()*t->nb[2]);
}

static ggml_tensor * xkv_view_coef_v(ggml_context * ctx, const llama_kv_cache_xkv_context * mctx, const xkv_store::group & gr) {
    ggml_tensor * t = gr.coef_v;
    return ggml_view_3d(ctx, t, mctx->get_n_slot(), t->ne[1], mctx->get_n_stream(), t->nb[1], t->nb[2], mctx->get_stream_0()*t->nb[2]);
}

// K and V [n_embd_head, n_head_kv, n_slot, n_stream] of a layer's stored tokens, as type
static ggml_tensor * xkv_materialize_k(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_type type, int il) {
    ggml_context * ctx   = gctx.ctx0;
    const auto &   xkv   = *inp->mctx->xkv;
    const auto &   l     = xkv.store->layers[il];
    const auto &   gr    = xkv.store->groups[l.ig];

    ggml_tensor *& coef = inp->coef_k[l.ig];
    if (!coef) {
        coef = ggml_cast(ctx, xkv_view_coef_k(ctx, inp->mctx, gr), GGML_TYPE_F32);
    }
    ggml_tensor * basis = ggml_view_2d(ctx, l.basis_k, l.basis_k->ne[0], gr.rank[0], l.basis_k->nb[1], 0);
    basis = ggml_cont(ctx, ggml_transpose(ctx, basis));

    const int64_t n_head_kv = gctx.hparams.n_head_kv(il);
    const int64_t n_stream  = inp->mctx->get_n_stream();

    ggml_tensor * k = ggml_add(ctx, ggml_mul_mat(ctx, basis, coef), l.mean_k); // [n_embd_k, n_slot, n_stream]
    k = ggml_reshape_3d(ctx, k, k->ne[0]/n_head_kv, n_head_kv, inp->n_slot*n_stream);
    k = xkv_rotate(ctx, xkv.model, xkv.cparams, il, k, inp->origin);
    k = type == GGML_TYPE_F32 ? k : ggml_cast(ctx, k, type);
    return ggml_reshape_4d(ctx, k, k->ne[0], n_head_kv, inp->n_slot, n_stream);
}

static ggml_tensor * xkv_materialize_v(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_type type, int il) {
    ggml_context * ctx = gctx.ctx0;
    const auto &   l   = inp->mctx->xkv->store->layers[il];
    const auto &   gr  = inp->mctx->xkv->store->groups[l.ig];

    ggml_tensor *& coef = inp->coef_v[l.ig];
    if (!coef) {
        coef = ggml_cast(ctx, xkv_view_coef_v(ctx, inp->mctx, gr), GGML_TYPE_F32);
        coef = ggml_cont(ctx, ggml_transpose(ctx, coef));
    }
    ggml_tensor * v = ggml_mul_mat(ctx, l.basis_v, coef); // [n_embd_v, n_slot, n_stream]
    v = type == GGML_TYPE_F32 ? v : ggml_cast(ctx, v, type);

    const int64_t n_head_kv = gctx.hparams.n_head_kv(il);
    return ggml_reshape_4d(ctx, v, v->ne[0]/n_head_kv, n_head_kv, inp->n_slot, inp->mctx->get_n_stream());
}

// q [n_embd_head, n_head, n_tokens], k [n_embd_head, n_head_kv, n_kv, n_stream], v [n_kv, n_head_kv, n_embd_head, n_stream]
static ggml_tensor * xkv_attn_materialized(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                                           ggml_tensor * v, float kq_scale, int il) {
    ggml_context * ctx = gctx.ctx0;

    v = ggml_cont(ctx, ggml_permute(ctx, v, 2, 1, 0, 3));
    if (inp->n_slot > 0) {
        k = ggml_concat(ctx, xkv_materialize_k(gctx, inp, k->type, il), k, 2);
        v = ggml_concat(ctx, xkv_materialize_v(gctx, inp, v->type, il), v, 2);
    }
    return gctx.build_attn_mha(q, k, v, nullptr, inp->mask_all, nullptr, nullptr, 0, kq_scale, il);
}

// scores [n_slot, n_tps, n_head, n_stream] of the stored tokens
static ggml_tensor * xkv_scores(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, int il) {
    ggml_context * ctx = gctx.ctx0;
    const auto &   xkv = *inp->mctx->xkv;
    const auto &   l   = xkv.store->layers[il];
    const auto &   gr  = xkv.store->groups[l.ig];

    const int64_t n_embd_head = q->ne[0];
    const int64_t n_head      = q->ne[1];
    const int64_t n_head_kv   = gctx.hparams.n_head_kv(il);
    const int64_t n_gqa       = n_head/n_head_kv;
    const int64_t n_stream    = inp->mctx->get_n_stream();
    const int64_t n_tps       = q->ne[2]/n_stream;
    const int64_t n_chunk     = xkv.store->n_chunk;
    const int64_t n_frame     = inp->n_slot/n_chunk;
    const int64_t n_rank      = gr.rank[0];
    const int64_t n_ext       = l.basis_k->ne[1]; // the directions and the mean

    // every query in the frame of every chunk
    q = ggml_is_contiguous(q) ? q : ggml_cont(ctx, q);
    q = ggml_reshape_4d(ctx, q, n_embd_head, n_head*n_tps, 1, n_stream);
    q = ggml_repeat_4d(ctx, q, n_embd_head, n_head*n_tps, n_frame, n_stream);
    q = ggml_reshape_3d(ctx, q, n_embd_head, n_head*n_tps, n_frame*n_stream);
    q = xkv_rotate(ctx, xkv.model, xkv.cparams, il, q, inp->origin);

    // through the basis: rows that share a KV head together
    const int64_t n_row = n_tps*n_frame*n_stream;
    q = ggml_reshape_4d(ctx, q, n_embd_head, n_gqa, n_head_kv, n_row);
    q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 1, 3, 2)); // [n_embd_head, n_gqa, n_row, n_head_kv]
    q = ggml_reshape_3d(ctx, q, n_embd_head, n_gqa*n_row, n_head_kv);

    ggml_tensor * basis = ggml_view_3d(ctx, l.basis_k, n_embd_head, n_ext, n_head_kv, l.basis_k->nb[1],
                                       ggml_row_size(l.basis_k->type, n_embd_head), 0);

    q = ggml_mul_mat(ctx, basis, q); // [n_ext, n_gqa*n_row, n_head_kv]
    q = ggml_reshape_4d(ctx, q, n_ext, n_gqa, n_row, n_head_kv);
    q = ggml_cont(ctx, ggml_permute(ctx, q, 0, 1, 3, 2)); // [n_ext, n_gqa, n_head_kv, n_row]
    q = ggml_reshape_4d(ctx, q, n_ext, n_head*n_tps, n_frame, n_stream);

    // to the coefficients of the chunk
    ggml_tensor * q_coef = ggml_view_4d(ctx, q, n_rank, q->ne[1], q->ne[2], q->ne[3], q->nb[1], q->nb[2], q->nb[3], 0);
    ggml_tensor * q_mean = ggml_view_4d(ctx, q, 1,      q->ne[1], q->ne[2], q->ne[3], q->nb[1], q->nb[2], q->nb[3], n_rank*q->nb[0]);

    ggml_tensor * coef = gr.coef_k;
    coef = ggml_view_4d(ctx, coef, n_rank, n_chunk, n_frame, n_stream, coef->nb[1], n_chunk*coef->nb[1], coef->nb[2],
                        inp->mctx->get_stream_0()*coef->nb[2]);

    ggml_tensor * s = ggml_mul_mat(ctx, coef, q_coef); // [n_chunk, n_head*n_tps, n_frame, n_stream]

    // the sum lays the scores out by slot
    if (n_stream == 1) {
        s      = ggml_permute(ctx, ggml_reshape_4d(ctx, s, n_chunk, n_head, n_tps, n_frame), 0, 3, 2, 1);
        q_mean = ggml_view_4d(ctx, q_mean, 1, n_head, n_tps, n_frame, q_mean->nb[1], n_head*q_mean->nb[1], q_mean->nb[2], 0);
        q_mean = ggml_permute(ctx, q_mean, 0, 3, 2, 1);
    } else {
        s      = ggml_permute(ctx, s,      0, 2, 1, 3);
        q_mean = ggml_permute(ctx, q_mean, 0, 2, 1, 3);
    }
    return ggml_reshape_4d(ctx, ggml_add(ctx, s, q_mean), inp->n_slot, n_tps, n_head, n_stream);
}

static ggml_tensor * xkv_attn_absorbed(const llm_graph_context & gctx, llm_graph_input_xkv * inp, ggml_tensor * q, ggml_tensor * k,
                                       ggml_tensor * v, float kq_scale, int il) {
    ggml_context * ctx     = gctx.ctx0;
    const auto &   hparams = gctx.hparams;

    const int64_t n_head    = q->ne[1];
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_kv      = k->ne[2];
    const int64_t n_stream  = k->ne[3];
    const int64_t n_tps     = q->ne[2]/n_stream;
    const int64_t n_slot    = inp->n_slot;

    // scores of the window
    ggml_tensor * q_w = ggml_view_4d(ctx, q, q->ne[0], n_head, n_tps, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tps, 0);
    ggml_tensor * kq  = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q_w, 0, 2, 1, 3)); // [n_kv, n_tps, n_head, n_stream]
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    if (n_slot > 0) {
        kq = ggml_concat(ctx, xkv_scores(gctx, inp, q, il), kq, 0);
    }
    if (hparams.attn_soft_cap) {
        kq = ggml_tanh (ctx, ggml_scale(ctx, kq, 1.0f/hparams.f_attn_logit_softcapping));
        kq = ggml_scale(ctx, kq, hparams.f_attn_logit_softcapping);
    }
    kq = ggml_soft_max_ext(ctx, kq, inp->mask_all, kq_scale, 0.0f);

    // output of the window
    ggml_tensor * p_w = ggml_view_4d(ctx, kq, n_kv, n_tps, n_head, n_stream, kq->nb[1], kq->nb[2], kq->nb[3], n_slot*kq->nb[0]);
    ggml_tensor * out = ggml_mul_mat(ctx, ggml_permute(ctx, v, 0, 2, 1, 3), p_w); // [n_embd_head, n_tps, n_head, n_stream]

    // output of the store
    if (n_slot > 0) {
        const auto & l  = inp->mctx->xkv->store->layers[il];
        const auto & gr = inp->mctx->xkv->store->groups[l.ig];

        const int64_t n_embd_head = out->ne[0];
        const int64_t n_rank      = gr.rank[1];

        ggml_tensor * p_s  = ggml_view_4d(ctx, kq, n_slot, n_tps*n_head, 1, n_stream, kq->nb[1], kq->nb[3], kq->nb[3], 0);
        ggml_tensor * coef = xkv_view_coef_v(ctx, inp->mctx, gr);
        coef = ggml_view_4d(ctx, coef, n_slot, n_rank, 1, n_stream, coef->nb[1], coef->nb[2], coef->nb[2], 0);

        ggml_tensor * o = ggml_mul_mat(ctx, coef, p_s); // [n_rank, n_tps*n_head, 1, n_stream]
        o = ggml_reshape_4d(ctx, o, n_rank, n_tps*n_head/n_head_kv, n_head_kv, n_stream);

        ggml_tensor * basis = ggml_view_3d(ctx, l.basis_v, n_rank, n_embd_head, n_head_kv, l.basis_v->nb[1], n_embd_head*l.basis_v->nb[1], 0);

        o   = ggml_mul_mat(ctx, basis, o); // [n_embd_head, n_tps*n_gqa, n_head_kv, n_stream]
        out = ggml_add(ctx, out, ggml_reshape_4d(ctx, o, n_embd_head, n_tps, n_head, n_stream));
    }

    return ggml_permute(ctx, out, 0, 2, 1, 3); // [n_embd_head, n_head, n_tps, n_stream]
}

//
// hooks
//

ggml_tensor * xkv_center_v(ggml_context * ctx, const llama_kv_cache_xkv_context * mctx, ggml_tensor * v_cur, int il) {
    ggml_tensor * mean = mctx->xkv->store->layers[il].mean_v;
    return ggml_sub(ctx, v_cur, ggml_reshape_2d(ctx, mean, v_cur->ne[0], v_cur->ne[1]));
}

ggml_tensor * xkv_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp_kv, ggml_tensor * q, ggml_tensor * k,
                             ggml_tensor * v, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    const auto * mctx = inp_kv->mctx->as_xkv();

    // reached when the context reserves its graphs, inside llama_init_from_model
    if (kq_b || sinks) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "layer %d adds %s to its attention, which an xkv cache does not support yet; use kv_mode q8_0 or q4_0",
                  il, kq_b ? "a bias" : "sink logits");
    }

    if (!gctx.cparams.flash_attn) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "flash attention was turned off for this context, but an xkv cache needs it; set flash_attn_type to enabled");
    }

    auto * inp = xkv_get_input(gctx, mctx);
    if (!inp->mask_all) {
        ggml_tensor * mask = inp_kv->get_kq_mask();
        inp->mask_all = inp->mask ? ggml_concat(gctx.ctx0, inp->mask, mask, 0) : mask;
    }

    ggml_tensor * out = inp->absorb ? xkv_attn_absorbed    (gctx, inp, q, k, v, kq_scale, il) :
                                      xkv_attn_materialized(gctx, inp, q, k, v, kq_scale, il);

    // softmax weights sum to one, so that what centring took from V comes back once; the sum is contiguous
    ggml_tensor * mean = mctx->xkv->store->layers[il].mean_o;
    if (inp->absorb) {
        mean = ggml_reshape_2d(gctx.ctx0, mean, out->ne[0], out->ne[1]);
    }
    out = ggml_add(gctx.ctx0, out, mean);
    out = ggml_reshape_2d(gctx.ctx0, out, gctx.hparams.n_embd_head_v(il)*q->ne[1], q->ne[2]);
    ggml_build_forward_expand(gctx.gf, out);
    return out;
}

uint32_t xkv_graph_max_nodes(const llama_memory_i * mem) {
    const auto * xkv = dynamic_cast<const llama_kv_cache_xkv *>(mem);
    return xkv ? 64*xkv->store->layers.size() : 0;
}
