// Stages of the store: how its bytes are divided while few tokens are stored, and the change from one to the next.

#include "base/xkv-codec.h"
#include "base/xkv-error.h"
#include "base/xkv-memory.h"
#include "store/xkv-store.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <utility>

// decoding multiplies with coefficients and bases as they are stored
static void xkv_check_supported(ggml_backend_dev_t dev, ggml_type type, const char * what) {
    ggml_context_ptr ctx(ggml_init({ /*.mem_size =*/4 * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true }));

    const int64_t n = 256; // whole blocks of every type
    ggml_tensor * a = ggml_new_tensor_2d(ctx.get(), type, n, n);
    ggml_tensor * b = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, n, 1);
    if (!ggml_backend_dev_supports_op(dev, ggml_mul_mat(ctx.get(), a, b))) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "%s of type %s cannot be multiplied on %s; leave %s out of the types", what, ggml_type_name(type),
                  ggml_backend_dev_name(dev), ggml_type_name(type));
    }
}

xkv_store::layout xkv_store::make_layout(uint32_t stage, uint32_t n_used) const {
    const bool plain = stages[stage].plain();

    layout res;
    res.stage = stage;
    res.bufs.resize(sidecar.groups.size());
    for (size_t ig = 0; ig < sidecar.groups.size(); ++ig) {
        const auto & sg = sidecar.groups[ig];

        group gr = { sg.layers, { sg.dim[0], sg.dim[1] }, { 0, 0 }, {}, can_pack(sg.layers), nullptr };
        for (auto kd : { kind::K, kind::V }) {
            const auto add = [&](ggml_type type, ggml_type type_basis, float noise, uint32_t rank, uint32_t n_head) {
                gr.segments[kd].push_back({ type, type_basis, noise, gr.rank[kd], rank, nullptr, 0, gr.pack ? n_head : 1 });
                gr.rank[kd] += rank;
            };
            if (plain) {
                for (uint32_t il : gr.dim[kd] > 0 ? gr.layers : std::vector<uint32_t>()) {
                    add(stages[stage].type, GGML_TYPE_COUNT, stages[stage].noise, sidecar.n_embd[kd][il], model.hparams.n_head_kv(il));
                }
                continue;
            }
            for (const auto & seg : stages[stage].segments[kd][ig]) {
                // rows of K, and of the bases of V, are whole blocks
                const uint32_t block = std::max(kd == kind::K ? xkv_block_size(seg.type) : 1, 32u);
                add(seg.type, seg.type_basis, seg.noise, GGML_PAD(seg.rank, block), 1);
            }
        }
        const size_t n_tensor = 1 + (1 + gr.layers.size()) * (gr.segments[kind::K].size() + gr.segments[kind::V].size());
        xkv_ask(n_tensor * ggml_tensor_overhead() + 64 * 1024);
        res.ctxs.push_back(ggml_context_ptr(
            ggml_init({ /*.mem_size =*/n_tensor * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true })));
        res.groups.push_back(gr);
    }
    if (!plain) {
        res.bases = make_bases(res.groups, [&](uint32_t il) { return res.ctxs[layer_of(il).ig].get(); });
    }
    for (size_t ig = 0; ig < res.groups.size(); ++ig) {
        make_coef(res, ig, n_used);
    }
    return res;
}

void xkv_store::make_coef(layout & l, uint32_t ig, uint32_t n_used) const {
    const bool plain = stages[l.stage].plain();
    auto &     gr    = l.groups[ig];
    auto *     ctx   = l.ctxs[ig].get();

    if (!gr.pack) {
        const int64_t n = stages[l.stage].n_slot;
        for (auto kd : { kind::K, kind::V }) {
            for (auto & seg : gr.segments[kd]) {
                seg.coef = kd == kind::K ? ggml_new_tensor_3d(ctx, seg.type, seg.rank, n, n_stream) :
                                           ggml_new_tensor_3d(ctx, seg.type, n, seg.rank, n_stream);
                ggml_format_name(seg.coef, "xkv_coef_%c_g%u_%s", kd == kind::K ? 'k' : 'v', ig, ggml_type_name(seg.type));
            }
        }
        return;
    }
    // K, then V; of each layer when plain
    size_t     n_byte = 0;
    const auto put    = [&](segment & seg) {
        seg.offset = n_byte;
        n_byte += ggml_row_size(seg.type, (int64_t) n_chunk * seg.rank);
    };
    for (size_t i = 0; plain && i < gr.layers.size(); ++i) {
        put(gr.segments[kind::K][i]);
        put(gr.segments[kind::V][i]);
    }
    for (auto kd : { kind::K, kind::V }) {
        for (auto & seg : gr.segments[kd]) {
            if (!plain) {
                put(seg);
            }
        }
    }
    gr.packed = ggml_new_tensor_3d(ctx, GGML_TYPE_I8, n_byte, n_used / n_chunk, n_stream);
    ggml_format_name(gr.packed, "xkv_coef_g%u", ig);
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
                    xkv_check_supported(device(sidecar.groups[ig].layers[0]), seg.type, "coefficients");
                    xkv_check_supported(device(sidecar.groups[ig].layers[0]), seg.type_basis, "bases");
                }
            }
        }
    }

    const auto sizes = [&](const layout & l) {
        std::map<ggml_backend_buffer_type_t, size_t> res;
        for (size_t ig = 0; ig < l.groups.size(); ++ig) {
            const auto type = buft(l.groups[ig].layers[0]);
            res[type] += ggml_backend_alloc_ctx_tensors_from_buft_size(l.ctxs[ig].get(), type);
        }
        return res;
    };

    layout full = make_layout(stages.size() - 1, stages.back().n_slot);
    for (const auto & [type, size] : sizes(full)) {
        auto & mem = arena[type];
        mem.buf.reset(ggml_backend_buft_alloc_buffer(type, no_alloc ? 0 : size));
        if (!mem.buf) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the xkv store (%zu bytes on %s); use a smaller n_ctx or a higher ratio", size,
                      ggml_backend_buft_name(type));
        }
        mem.size = no_alloc ? size : ggml_backend_buffer_get_size(mem.buf.get());
        ggml_backend_buffer_clear(mem.buf.get(), 0);
    }
    for (size_t ig = 0; ig < full.groups.size(); ++ig) {
        const auto & gr   = full.groups[ig];
        const auto   type = buft(gr.layers[0]);
        const auto   size = [&](const ggml_tensor * t) {
            return GGML_PAD(ggml_backend_buft_get_alloc_size(type, t), ggml_backend_buft_get_alignment(type));
        };
        size_t n_k = 0;
        size_t n   = 0;
        if (gr.packed) {
            n   = size(gr.packed);
            n_k = gr.segments[kind::V][0].offset * ggml_nrows(gr.packed);
        } else {
            for (auto kd : { kind::K, kind::V }) {
                for (const auto & seg : gr.segments[kd]) {
                    n += size(seg.coef);
                    n_k += kd == kind::K ? size(seg.coef) : 0;
                }
            }
        }
        arena_bytes[PART_COEF_K] += n_k;
        arena_bytes[PART_COEF_V] += n - n_k;
        for (ggml_tensor * t = ggml_get_first_tensor(full.ctxs[ig].get()); t; t = ggml_get_next_tensor(full.ctxs[ig].get(), t)) {
            arena_bytes[PART_BASES] += size(t);
        }
        arena_bytes[PART_BASES] -= n;
    }

    // where layers are on several devices, each has to hold its share of every stage
    for (size_t i = stages.size() - 1; i-- > 0;) {
        const auto list = sizes(make_layout(i, stages[i].n_slot));
        if (std::any_of(list.begin(), list.end(), [&](const auto & e) { return e.second > arena[e.first].size; })) {
            LLAMA_LOG_WARN("%s: the stage for %u tokens takes more than the full store on some device and is left out\n", __func__,
                           stages[i].n_slot);
            stages.erase(stages.begin() + i);
        }
    }
    full.stage = stages.size() - 1;

    place(full);
    fill_bases(full);
    now = std::move(full);
}

void xkv_store::place(layout & l) const {
    std::map<ggml_backend_buffer_type_t, ggml_tallocr> allocs;
    for (size_t ig = 0; ig < l.groups.size(); ++ig) {
        const auto type = buft(l.groups[ig].layers[0]);
        auto *     buf  = arena.at(type).buf.get();
        if (no_alloc) {
            xkv_pretend(l.ctxs[ig].get(), buf);
            continue;
        }
        if (allocs.count(type) == 0) {
            allocs[type] = ggml_tallocr_new(buf);
        }
        for (ggml_tensor * t = ggml_get_first_tensor(l.ctxs[ig].get()); t; t = ggml_get_next_tensor(l.ctxs[ig].get(), t)) {
            GGML_ASSERT(ggml_tallocr_alloc(&allocs[type], t) == GGML_STATUS_SUCCESS);
        }
    }
}

void xkv_store::restart(uint32_t stage) {
    for (const auto & [type, mem] : arena) {
        ggml_backend_buffer_clear(mem.buf.get(), 0);
    }
    layout fresh = make_layout(stage, stages[stage].n_slot);
    place(fresh);
    fill_bases(fresh);
    now     = std::move(fresh);
    changed = false;
    n_tensor_change++;
}

xkv_store::layout xkv_store::begin(uint32_t stage, uint32_t n_used) const {
    return make_layout(stage, n_used);
}

// where a context's tensors lie in a buffer from an offset on, and where the last one ends
static std::vector<size_t> xkv_places(ggml_context * ctx, ggml_backend_buffer_t buf, size_t begin) {
    std::vector<size_t> res;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        res.push_back(GGML_PAD(begin, ggml_backend_buffer_get_alignment(buf)));
        begin = res.back() + ggml_backend_buffer_get_alloc_size(buf, t);
    }
    res.push_back(begin);
    return res;
}

static void xkv_put(ggml_tensor * t, ggml_backend_buffer_t buf, size_t at) {
    t->buffer = nullptr;
    t->data   = nullptr;
    GGML_ASSERT(ggml_backend_tensor_alloc(buf, t, (char *) ggml_backend_buffer_get_base(buf) + at) == GGML_STATUS_SUCCESS);
}

void xkv_store::begin_group(layout & next, uint32_t ig) const {
    auto & gr = next.groups[ig];
    if (gr.pack) {
        // where chunks do not shrink, or do not fit, they wait in host memory
        auto * buf              = arena.at(buft(gr.layers[0])).buf.get();
        const auto [begin, end] = region(now, ig);
        const auto places       = xkv_places(next.ctxs[ig].get(), buf, begin);
        if (places.back() <= end && gr.packed->ne[0] <= now.groups[ig].packed->ne[0]) {
            xkv_put(gr.packed, buf, places[places.size() - 2]); // the last tensor
        }
    }
    ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(next.ctxs[ig].get(), ggml_backend_cpu_buffer_type());
    if (!buf) {
        xkv_throw(XKV_STATUS_NO_MEMORY, "cannot allocate the next stage of the xkv store (for %u tokens)", stages[next.stage].n_slot);
    }
    next.bufs[ig].reset(buf);
    if (!gr.pack) {
        ggml_backend_buffer_clear(buf, 0); // stock ops read all slots
    }

    size_t n = 0;
    for (const auto & b : next.bufs) {
        n += b ? ggml_backend_buffer_get_size(b.get()) : 0;
    }
    n_staged = std::max(n_staged, n);
}

uint32_t xkv_store::n_free(const layout & next, uint32_t ig, uint32_t unread) const {
    const ggml_tensor * from = now.groups[ig].packed;
    const ggml_tensor * to   = next.groups[ig].packed;
    if (to->buffer != from->buffer) {
        return to->ne[1];
    }
    const ptrdiff_t room = (char *) from->data + unread * from->nb[1] - (char *) to->data;
    return room <= 0 ? 0 : std::min<size_t>(to->ne[1], room / to->nb[1]);
}

std::pair<size_t, size_t> xkv_store::region(const layout & l, uint32_t ig) const {
    const auto type = buft(l.groups[ig].layers[0]);
    auto *     buf  = arena.at(type).buf.get();
    const auto at   = [&](uint32_t i) {
        return (size_t) ((char *) ggml_get_first_tensor(l.ctxs[i].get())->data - (char *) ggml_backend_buffer_get_base(buf));
    };
    for (uint32_t i = ig + 1; i < l.groups.size(); ++i) {
        if (buft(l.groups[i].layers[0]) == type) {
            return { at(ig), at(i) };
        }
    }
    return { at(ig), ggml_backend_buffer_get_size(buf) };
}

void xkv_store::end_group(layout & next, uint32_t ig) const {
    const auto & gr  = next.groups[ig];
    auto *       buf = arena.at(buft(gr.layers[0])).buf.get();
    if (!gr.pack || gr.packed->buffer != buf) {
        return;
    }
    // the bases before the coefficients
    const auto places = xkv_places(next.ctxs[ig].get(), buf, region(now, ig).first);
    size_t     i      = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(next.ctxs[ig].get()); t != gr.packed; t = ggml_get_next_tensor(next.ctxs[ig].get(), t)) {
        const void * from = t->data;
        xkv_put(t, buf, places[i++]);
        ggml_backend_tensor_set(t, from, 0, ggml_nbytes(t));
    }
    next.bufs[ig].reset();
}

// src's bytes at the begin of dst, which may overlap
static void xkv_move(const ggml_tensor * src, ggml_tensor * dst) {
    static const size_t XKV_MOVE_BYTES = 256 * 1024;

    const size_t n_byte = ggml_nbytes(src);
    const bool   up     = dst->data > src->data;

    std::vector<uint8_t> data(std::min(n_byte, XKV_MOVE_BYTES));
    for (size_t done = 0; done < n_byte;) {
        const size_t n  = std::min(data.size(), n_byte - done);
        const size_t at = up ? n_byte - done - n : done;
        ggml_backend_tensor_get(src, data.data(), at, n);
        ggml_backend_tensor_set(dst, data.data(), at, n);
        done += n;
    }
}

void xkv_store::commit(layout && next) {
    layout full = make_layout(next.stage, stages[next.stage].n_slot);
    place(full);

    const auto tensors = [](const layout & l, uint32_t ig) {
        std::vector<ggml_tensor *> res;
        for (ggml_tensor * t = ggml_get_first_tensor(l.ctxs[ig].get()); t; t = ggml_get_next_tensor(l.ctxs[ig].get(), t)) {
            res.push_back(t);
        }
        return res;
    };
    const auto move = [&](uint32_t ig, bool last_first) {
        auto src = tensors(next, ig);
        auto dst = tensors(full, ig);
        if (last_first) {
            std::reverse(src.begin(), src.end());
            std::reverse(dst.begin(), dst.end());
        }
        for (size_t i = 0; i < src.size(); ++i) {
            xkv_move(src[i], dst[i]);
        }
    };
    // Groups that are in the arena keep their order there: those that go up move from the last one on, then those that go down
    // from the first one on, so that none is written over before it has moved.
    const uint32_t n  = full.groups.size();
    const auto     up = [&](uint32_t ig) { return tensors(full, ig)[0]->data > tensors(next, ig)[0]->data; };
    for (uint32_t ig = n; ig-- > 0;) {
        if (!next.bufs[ig] && up(ig)) {
            move(ig, true);
        }
    }
    for (uint32_t ig = 0; ig < n; ++ig) {
        if (!next.bufs[ig] && !up(ig)) {
            move(ig, false);
        }
    }
    for (uint32_t ig = 0; ig < n; ++ig) {
        if (next.bufs[ig]) {
            move(ig, false);
        }
    }
    now     = std::move(full);
    changed = true;
    n_tensor_change++;
}
