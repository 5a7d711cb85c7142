// Saved states: what a stream's store holds, as it stands, and how it comes into a store of another plan. There, coefficients are made
// anew for the stage that has room for them, with the bases of the state where the stream has none of its own to keep.

#include "flow/xkv-flow.h"

#include "base/xkv-lapack.h"
#include "flow/xkv-online.h"
#include "format/xkv-sidecar.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <algorithm>
#include <numeric>

void xkv_flow::save(uint32_t stream, llama_seq_id seq_id, xkv_bytes_out & out) const {
    const auto & table = tables[stream];

    out.put_list(store.signature(store.stage()));
    const size_t n_byte = store.has_own_bases(stream) ? store.basis_bytes() : 0;
    out.put((uint64_t) n_byte);
    if (n_byte > 0) {
        store.get_bases(stream, out.more(n_byte));
    }
    xkv_bytes_out known;
    if (online) {
        online->save(stream, known);
    }
    out.put_list(known.data);

    const size_t n_coef = store.chunk_bytes();
    out.put((uint64_t) n_coef);
    std::vector<uint32_t> chunks;
    for (uint32_t ic : table.used()) {
        if (seq_id < 0 || table[ic].seqs.test(seq_id)) {
            chunks.push_back(ic);
        }
    }
    out.put((uint32_t) chunks.size());
    for (uint32_t ic : chunks) {
        const auto & chunk = table[ic];
        out.put(chunk.pos);
        out.put_list(chunk.offsets);
        out.put(seq_id < 0 ? chunk.seqs : xkv_seq_set().set(seq_id));
        store.get_chunk(stream, ic, out.more(n_coef));
    }
}

static xkv_saved_span xkv_take_span(xkv_bytes_in & in) {
    const auto n = in.get<uint64_t>();
    return { in.take(n), (size_t) n };
}

xkv_saved_store xkv_flow::parse(xkv_bytes_in & in, uint32_t n_seq_max) const {
    xkv_saved_store res = {};
    res.signature       = in.get_list<uint32_t>();
    res.bases           = xkv_take_span(in);
    res.online          = xkv_take_span(in);
    res.chunk_bytes     = in.get<uint64_t>();
    const size_t n      = in.get<uint32_t>();
    for (size_t i = 0; i < n; ++i) {
        xkv_chunk c;
        c.pos             = in.get<llama_pos>();
        c.offsets         = in.get_list<uint16_t>();
        c.seqs            = in.get<xkv_seq_set>();
        c.n               = c.offsets.size();
        const auto * coef = in.take(res.chunk_bytes);
        const bool   rise = std::adjacent_find(c.offsets.begin(), c.offsets.end(), std::greater<uint16_t>()) == c.offsets.end();
        if (c.n == 0 || c.n > store.n_chunk || c.first() < 0 || c.first() > (1 << 30) || !rise || c.seqs.none() ||
            (c.seqs >> n_seq_max).any()) {
            xkv_throw(XKV_STATUS_FORMAT, "chunk %zu of the state has %u tokens from position %d, expected 1 to %u of sequences below %u", i,
                      c.n, c.pos, store.n_chunk, n_seq_max);
        }
        res.seqs |= c.seqs;
        res.n_token += c.n;
        res.chunks.push_back({ std::move(c), coef });
    }
    return res;
}

// the stage of the same bytes; their number when there is none
static uint32_t xkv_same_stage(const xkv_store & store, const std::vector<uint32_t> & signature) {
    uint32_t stage = 0;
    while (stage < store.n_stage() && store.signature(stage) != signature) {
        stage++;
    }
    return stage;
}

bool xkv_flow::has_bases(uint32_t stream, const xkv_saved_store & saved) const {
    if (store.has_own_bases(stream) != (saved.bases.size > 0)) {
        return false;
    }
    std::vector<uint8_t> mine(saved.bases.size);
    if (mine.size() == 0) {
        return true;
    }
    if (mine.size() != store.basis_bytes()) {
        return false;
    }
    store.get_bases(stream, mine.data());
    return memcmp(mine.data(), saved.bases.data, mine.size()) == 0;
}

void xkv_flow::prepare(llama_context * lctx, uint32_t stream, bool alone, size_t n_stay, size_t n_more, xkv_saved_store & saved) const {
    const auto     slots = store.stage_slots();
    const size_t   n     = saved.chunks.size();
    const uint32_t same  = xkv_same_stage(store, saved.signature);
    const bool     fits  = same < slots.size() && (n_stay + n) * store.n_chunk <= slots[same];

    const size_t n_room = (alone ? slots.back() : store.n_slot_now()) / store.n_chunk;
    if (n_stay + n + n_more > n_room) {
        xkv_throw(XKV_STATUS_MODEL_MISMATCH, "the state takes %zu chunks of %u tokens, this cache has room for %zu; %s", n + n_more,
                  store.n_chunk, n_room - std::min(n_room, n_stay), alone ? "raise n_ctx" : "load it into an empty context");
    }
    if (fits && (alone || (same == store.stage() && has_bases(stream, saved)))) {
        saved.stage = same;
        if (saved.chunk_bytes != store.chunk_bytes(same) || (saved.bases.size > 0 && saved.bases.size != store.basis_bytes(same))) {
            xkv_throw(XKV_STATUS_FORMAT, "the state has chunks of %zu bytes and %zu bytes of bases, expected %zu and %zu",
                      saved.chunk_bytes, saved.bases.size, store.chunk_bytes(same), store.basis_bytes(same));
        }
        return;
    }
    if (n == 0) {
        saved.stage = alone ? 0 : store.stage();
        return;
    }
    if (!lctx) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "a state of another plan cannot be taken before the context's first batch; call xkv_attach, or "
                                          "decode a token first");
    }
    saved.stage = alone ? xkv_select_stage(slots, 0, store.n_chunk, n) : store.stage();
    saved.image = store.image(saved.signature, n);
    // the bases that a plain stage ends with are made where nothing else is stored
    const bool first = alone && tables.size() == 1;
    const bool bases = setup.sidecar.calibrated() || (!alone && store.has_own_bases(stream));
    if (saved.image->plain() && !store.plain() && !first && !bases) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "a state of a plain stage cannot be taken into one of several streams, or beside sequences that "
                                          "have none of their own bases yet, without calibration; evaluate the prompt again");
    }
    if (saved.chunk_bytes != saved.image->chunk_bytes() || (saved.bases.size > 0 && saved.bases.size != saved.image->basis_bytes())) {
        xkv_throw(XKV_STATUS_FORMAT, "the state has chunks of %zu bytes and %zu bytes of bases, expected %zu and %zu", saved.chunk_bytes,
                  saved.bases.size, saved.image->chunk_bytes(), saved.image->basis_bytes());
    }
}

void xkv_flow::take(llama_context * lctx, uint32_t stream, bool alone, const xkv_saved_store & saved) {
    if (alone && tables.size() == 1) {
        restart(saved.stage);
    } else if (alone) {
        reset(stream);
    }
    const size_t n    = saved.chunks.size();
    const auto   free = tables[stream].free(n);
    if (saved.image) {
        move(lctx, stream, alone, saved, free);
    } else if (n > 0 || saved.stage == xkv_same_stage(store, saved.signature)) {
        if (alone && saved.bases.size > 0) {
            store.set_bases(stream, saved.bases.data);
        }
        if (alone && online) {
            xkv_bytes_in in(saved.online.data, saved.online.size);
            online->load(stream, in);
        }
        for (size_t i = 0; i < n; ++i) {
            store.set_chunk(stream, free[i], saved.chunks[i].coef);
        }
    }
    for (size_t i = 0; i < n; ++i) {
        tables[stream].put(free[i], xkv_chunk(saved.chunks[i].chunk));
    }
}

void xkv_flow::move(llama_context * lctx, uint32_t stream, bool alone, const xkv_saved_store & saved,
                    const std::vector<uint32_t> & chunks) {
    xkv_store & image = *saved.image;
    if (saved.bases.size > 0) {
        image.set_bases(0, saved.bases.data);
    }
    std::vector<xkv_chunk_table> there = { xkv_chunk_table(store.n_chunk, chunks.size()) };
    for (size_t i = 0; i < chunks.size(); ++i) {
        image.set_chunk(0, i, saved.chunks[i].coef);
        there[0].put(i, xkv_chunk(saved.chunks[i].chunk));
    }

    // what a plain stage holds is as good as the tokens: the bases are made for them, as at its end
    std::unique_ptr<xkv_online_bases> first;
    if (online && alone) {
        xkv_bytes_in in(saved.online.data, saved.online.size);
        if (image.plain() && !store.plain() && tables.size() == 1) {
            first = std::make_unique<xkv_online_bases>(setup, image, there, flush);
            first->load(0, in);
            first->begin_stage(0, {});
            store.set_changed();
        } else {
            online->load_moved(stream, in, saved.bases.size > 0);
        }
    }
    const int n_thread = lctx->get_cparams().n_threads_batch;
    for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
        auto turns = first ? first->enter_stage(lctx, 0, {}, store.present(), ig) : xkv_recodes();
        for (auto kd : store.kinds(ig)) {
            if (!first) {
                turns[kd] = turn_from(image, kd, ig, stream, alone, saved.bases.size > 0, n_thread);
            }
            xkv_carry_into(image, store, kd, ig, stream, chunks, turns[kd], n_thread);
        }
    }
    if (first) {
        online->adopt(stream, *first);
    }
    xkv_trim();
}

xkv_recode xkv_flow::turn_from(const xkv_store & image, xkv_store::kind kd, uint32_t ig, uint32_t stream, bool alone, bool own,
                               int n_thread) {
    const uint32_t dim    = store.groups()[ig].dim[kd];
    const uint32_t rank   = store.groups()[ig].rank[kd];
    const uint32_t n_from = image.groups()[ig].rank[kd];
    if (image.plain()) {
        return store.plain() ? xkv_recode() : xkv_recode_all(store.get_basis(kd, ig, stream, n_thread), rank, dim);
    }
    if (!store.plain() && !own && (alone || !store.has_own_bases(stream))) {
        return xkv_recode(); // calibrated directions keep their places
    }
    auto rows = image.get_basis(kd, ig, 0, n_thread);
    if (store.plain()) {
        xkv_floats turned(rows.size());
        for (uint32_t r = 0; r < n_from; ++r) {
            for (uint32_t i = 0; i < dim; ++i) {
                turned[(size_t) i * n_from + r] = rows[(size_t) r * dim + i];
            }
        }
        return xkv_recode_all(std::move(turned), dim, n_from);
    }
    if (!alone) {
        // onto the bases of the others
        return xkv_recode_all(xkv_mul_rows(store.get_basis(kd, ig, stream, n_thread), rows, rank, n_from, dim, n_thread), rank, n_from);
    }
    rows.resize((size_t) rank * dim, 0.0f);
    store.own_bases(stream);
    if (online && n_from < rank) {
        online->fill_up(stream, kd, ig, rows);
    }
    store.set_basis(kd, ig, stream, rows, nullptr, n_thread);
    return xkv_recode();
}
