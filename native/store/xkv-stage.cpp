// Stages of the store: how its bytes are divided while few tokens are stored, and the change from one to the next.

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "store/xkv-store.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>

// decoding multiplies with coefficients and bases as they are stored
static void xkv_check_supported(ggml_backend_dev_t dev, ggml_type type, const char * what) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/ 4*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));

    const int64_t n = 256; // whole blocks of every type
    ggml_tensor * a = ggml_new_tensor_2d(ctx.get(), type,          n, n);
    ggml_tensor * b = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n, 1);
    if (!ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx.get(), a, b))) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s of type %s cannot be multiplied on %s; leave %s out of the types", what, ggml_type_name(type),
                  ggml_backend_dev_name(dev), ggml_type_name(type));
    }
}

xkv_store::layout xkv_store::make_layout(uint32_t stage) const {
    const bool plain = stages[stage].plain();

    layout res = { stage, {}, {}, {}, {} };

    size_t n_tensor = sidecar.groups.size() + 2*layer_list.size();
    for (auto kd : { kind::K, kind::V }) {
        for (size_t ig = 0; ig < stages[stage].segments[kd].size(); ++ig) {
            n_tensor += (1 + sidecar.groups[ig].layers.size())*stages[stage].segments[kd][ig].size();
        }
    }
    const ctx_of_t ctx_of = [&](uint32_t il) {
        auto & ctx = res.ctxs[buft(il)];
        if (!ctx) {
            ctx.reset(ggml_init({ /*.mem_size =*/ n_tensor*ggml_tensor_overhead(), /*.mem_buffer =*/ nullptr, /*.no_alloc =*/ true }));
        }
        return ctx.get();
    };

    const int64_t n = stages[stage].n_slot;
    for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
        const auto & sg = sidecar.groups[ig];

        group gr = { sg.layers, { sg.dim[0], sg.dim[1] }, { 0, 0 }, {}, nullptr };

        const bool pack = can_pack(sg.layers);
        for (auto kd : { kind::K, kind::V }) {
            const auto add = [&](ggml_type type, ggml_type type_basis, uint32_t rank, uint32_t n_head) {
                gr.segments[kd].push_back({ type, type_basis, gr.rank[kd], rank, nullptr, 0, pack ? n_head : 1 });
                gr.rank[kd] += rank;
            };
            if (plain) {
                for (uint32_t il : gr.layers) {
                    add(stages[stage].type, GGML_TYPE_COUNT, sidecar.n_embd[kd][il], model.hparams.n_head_kv(il));
                }
                continue;
            }
            for (const auto & seg : stages[stage].segments[kd][ig]) {
                // rows of K, and of the bases of V, are whole blocks
                const uint32_t block = std::max(kd == kind::K ? xkv_block_size(seg.type) : 1, 32u);
                add(seg.type, seg.type_basis, GGML_PAD(seg.rank, block), 1);
            }
        }
        if (pack) {
            // K, then V; of each layer when plain
            size_t n_byte = 0;
            const auto place = [&](segment & seg) {
                seg.offset = n_byte;
                n_byte += ggml_row_size(seg.type, (int64_t) n_chunk*seg.rank);
            };
            for (size_t i = 0; plain && i < gr.layers.size(); ++i) {
                place(gr.segments[kind::K][i]);
                place(gr.segments[kind::V][i]);
            }
            for (auto kd : { kind::K, kind::V }) {
                for (auto & seg : gr.segments[kd]) {
                    if (!plain) {
                        place(seg);
                    }
                }
            }
            gr.packed = ggml_new_tensor_3d(ctx_of(gr.layers[0]), GGML_TYPE_I8, n_byte, n/n_chunk, n_stream);
            ggml_format_name(gr.packed, "xkv_coef_g%zu", ig);
        } else {
            for (auto kd : { kind::K, kind::V }) {
                for (auto & seg : gr.segments[kd]) {
                    seg.coef = kd == kind::K ? ggml_new_tensor_3d(ctx_of(gr.layers[0]), seg.type, seg.rank, n, n_stream) :
                                               ggml_new_tensor_3d(ctx_of(gr.layers[0]), seg.type, n, seg.rank, n_stream);
                    ggml_format_name(seg.coef, "xkv_coef_%c_g%zu_%s", kd == kind::K ? 'k' : 'v', ig, ggml_type_name(seg.type));
                }
            }
        }
        res.groups.push_back(gr);
    }
    res.bases = plain ? basis_set() : make_bases(res.groups, ctx_of);
    return res;
}

std::vector<uint32_t> xkv_store::stage_slots() const {
    std::vector<uint32_t> res;
    for (const auto & stage : stages) {
        res.push_back(stage.n_slot);
    }
    return res;
}

void xkv_store::make_arena() {
    for (const auto & stage : stages) {
        for (auto kd : { kind::K, kind::V }) {
            for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
                if (can_pack(sidecar.groups[ig].layers)) {
                    continue;
                }
                if (stage.plain()) {
                    xkv_check_supported(device(sidecar.groups[ig].layers[0]), stage.type, "coefficients");
                    continue;
                }
                for (const auto & seg : stage.segments[kd][ig]) {
                    xkv_check_supported(device(sidecar.groups[ig].layers[0]), seg.type,       "coefficients");
                    xkv_check_supported(device(sidecar.groups[ig].layers[0]), seg.type_basis, "bases");
                }
            }
        }
    }

    layout full = make_layout(stages.size() - 1);
    for (const auto & [type, ctx] : full.ctxs) {
        const size_t size = ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), type);

        arena[type].reset(ggml_backend_buft_alloc_buffer(type, size));
        if (!arena[type]) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the xkv store (%zu bytes on %s); use a smaller n_ctx or a higher ratio",
                      size, ggml_backend_buft_name(type));
        }
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            arena_bytes[PART_BASES] += GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), ggml_backend_buft_get_alignment(type));
        }
    }
    for (const auto & gr : full.groups) {
        const auto type = buft(gr.layers[0]);
        const auto size = [&](const ggml_tensor * t) {
            return GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), ggml_backend_buft_get_alignment(type));
        };
        size_t n_k = 0;
        size_t n   = 0;
        if (gr.packed) {
            n   = size(gr.packed);
            n_k = gr.segments[kind::V][0].offset*ggml_nrows(gr.packed);
        } else {
            for (auto kd : { kind::K, kind::V }) {
                for (const auto & seg : gr.segments[kd]) {
                    n   += size(seg.coef);
                    n_k += kd == kind::K ? size(seg.coef) : 0;
                }
            }
        }
        arena_bytes[PART_COEF_K] += n_k;
        arena_bytes[PART_COEF_V] += n - n_k;
        arena_bytes[PART_BASES]  -= n;
    }

    // where layers are on several devices, each has to hold its share of every stage
    for (size_t i = stages.size() - 1; i-- > 0;) {
        const layout l    = make_layout(i);
        const bool   fits = std::all_of(l.ctxs.begin(), l.ctxs.end(), [&](const auto & e) {
            return ggml_backend_alloc_ctx_tensors_from_buft_size(e.second.get(), e.first) <= ggml_backend_buffer_get_size(arena[e.first].get());
        });
        if (!fits) {
            LLAMA_LOG_WARN("%s: the stage for %u tokens takes more than the full store on some device and is left out\n", __func__, stages[i].n_slot);
            stages.erase(stages.begin() + i);
        }
    }
    full.stage = stages.size() - 1;

    place(std::move(full));
    fill_bases(now);
}

void xkv_store::place(layout && fresh) {
    for (const auto & [type, ctx] : fresh.ctxs) {
        ggml_backend_buffer_t buf = arena[type].get();
        ggml_backend_buffer_clear(buf, 0);

        ggml_tallocr alloc = ggml_tallocr_new(buf);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            GGML_ASSERT(ggml_tallocr_alloc(&alloc, t) == GGML_STATUS_SUCCESS);
        }
    }
    now = std::move(fresh);
    n_tensor_change++;
}

void xkv_store::restart(uint32_t stage) {
    place(make_layout(stage));
    fill_bases(now);
    changed = false;
}

xkv_store::layout xkv_store::begin(uint32_t stage) const {
    layout res = make_layout(stage);
    for (const auto & [type, ctx] : res.ctxs) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_cpu_buffer_type());
        if (!buf) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the next stage of the xkv store (for %u tokens)", stages[stage].n_slot);
        }
        ggml_backend_buffer_clear(buf, 0);
        res.bufs.emplace_back(buf);
    }
    fill_bases(res);
    return res;
}

void xkv_store::commit(const layout & next) {
    place(make_layout(next.stage));
    for (const auto & [type, ctx] : now.ctxs) {
        ggml_context * from = next.ctxs.at(type).get();

        ggml_tensor * src = ggml_get_first_tensor(from);
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            ggml_backend_tensor_copy(src, t);
            src = ggml_get_next_tensor(from, src);
        }
    }
    changed = true;
}
