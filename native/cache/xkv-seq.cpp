// Operations on sequences: what llama_memory_i asks of a cache, over window and chunks together.

#include "base/xkv-error.h"
#include "cache/xkv-cache.h"
#include "flow/xkv-flow.h"

#include "llama-impl.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>

static const llama_pos XKV_MAX_POS = 1 << 30;

static void xkv_normalize(llama_pos & p0, llama_pos & p1) {
    p0 = p0 < 0 ? 0 : p0;
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
}

bool llama_kv_cache_xkv::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) noexcept {
    xkv_normalize(p0, p1);

    // as good as clearing it: what was refused was about tokens that are gone
    const auto only = [&] { // sequence that has tokens
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (s != seq_id && seq_pos_max(s) >= 0) {
                return false;
            }
        }
        return true;
    };
    if (broken && p0 == 0 && p1 == std::numeric_limits<llama_pos>::max() && (seq_id < 0 || only())) {
        return guard("removing all tokens", true, [&] { empty(true); });
    }

    if (seq_id >= (llama_seq_id) n_seq_max) {
        refuse("seq_rm: sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
        return false;
    }
    bool changed = lctx && window->has_shift();
    return guard("seq_rm", changed, [&] {
        settle();
        changed = false;
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (seq_id < 0 || s == seq_id) {
                make_room(s, p0, p1, changed);
                changed = true;
                seq_rm_one(s, p0, p1);
            }
        }
        drop_unused();
        start_over();
    });
}

uint32_t llama_kv_cache_xkv::check_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const uint32_t stream = get_stream(seq_id);
    const auto &   table  = tables[stream];

    // what remains goes back into the window where it can, else stays in its chunk, which others may need as it is
    size_t   n_cell = lctx ? window->n_free(seq_id, p0, p1) : 0;
    uint32_t n_new  = 0;
    for (uint32_t ic : table.find(seq_id, p0, p1)) {
        const size_t n_rest = table[ic].slots(p0, p1, false).size();
        if (n_rest <= n_cell) {
            n_cell -= n_rest;
        } else {
            n_new += table[ic].seqs.count() > 1;
        }
    }
    if (n_new > 0 && n_new > flow->n_free(stream, lctx != nullptr)) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "chunks that sequence %d shares with others are cut at positions %d and %d, and neither window nor store have room for "
                  "the parts; remove all of a sequence, or raise n_ctx",
                  seq_id, p0, p1);
    }
    return n_new;
}

void llama_kv_cache_xkv::make_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool & changes) {
    const uint32_t stream = get_stream(seq_id);
    // what is packed may be cut elsewhere; not all that could be packed by its number can be by its positions
    for (uint32_t n = check_room(seq_id, p0, p1); n > flow->n_free(stream, false); n = check_room(seq_id, p0, p1)) {
        try {
            flow->need_free(lctx, stream, n);
        } catch (...) {
            changes = flow->half_changed() || changes;
            throw;
        }
    }
}

void llama_kv_cache_xkv::seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const uint32_t stream = get_stream(seq_id);
    auto &         table  = tables[stream];

    get_window()->seq_rm(seq_id, p0, p1);

    for (uint32_t ic : table.find(seq_id, p0, p1)) {
        const llama_pos pos  = table[ic].first();
        const llama_pos end  = table[ic].end();
        const auto      rest = table[ic].slots(p0, p1, false);

        if (rest.size() == table[ic].n) {
            continue; // it has a hole there
        }
        if (rest.empty()) {
            table.seq_rm(ic, seq_id);
        } else if (lctx && rest.size() <= window->n_free(seq_id, 0, 0)) {
            // exact again, until it leaves together with what follows
            flow->restore(lctx, stream, ic, seq_id, pos, p0);
            flow->restore(lctx, stream, ic, seq_id, p1, end);
            table.seq_rm(ic, seq_id);
        } else if (table[ic].seqs.count() == 1) {
            flow->keep(lctx, stream, ic, rest);
        } else {
            table.seq_rm(flow->split(lctx, stream, ic, p0, p1), seq_id);
        }
    }
}

void llama_kv_cache_xkv::settle() {
    if (lctx && window->has_shift()) {
        flow->shift(lctx);
    }
}

void llama_kv_cache_xkv::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) noexcept {
    xkv_normalize(p0, p1);

    const llama_seq_id n_seq = n_seq_max;
    if (seq_id_src < 0 || seq_id_dst < 0 || seq_id_src >= n_seq || seq_id_dst >= n_seq) {
        broken = true;
        refuse("seq_cp from sequence %d to %d, expected both below n_seq_max = %d", seq_id_src, seq_id_dst, n_seq);
        return;
    }
    if (seq_id_src == seq_id_dst) {
        return;
    }
    const uint32_t s0 = get_stream(seq_id_src);
    const uint32_t s1 = get_stream(seq_id_dst);

    if (s0 == s1) {
        guard("seq_cp", true, [&] { seq_cp_in_stream(seq_id_src, seq_id_dst, p0, p1); });
        return;
    }

    // sequences that have streams of their own are copied whole, with the bases, and what was not asked for is removed from the copy
    const llama_pos max   = std::numeric_limits<llama_pos>::max();
    const bool      none  = seq_pos_max(seq_id_src) < 0;
    const bool      whole = none || (p0 <= seq_pos_min(seq_id_src) && p1 > seq_pos_max(seq_id_src));
    if (!whole && seq_pos_max(seq_id_dst) >= 0) {
        broken = true;
        refuse("seq_cp of positions %d to %d of sequence %d to %d, which has tokens: a part can be copied into an empty stream only; "
               "remove them first, or use kv_unified",
               p0, p1, seq_id_src, seq_id_dst);
        return;
    }
    if (none) {
        guard("seq_cp", true, [&] {
            seq_rm_one(seq_id_dst, 0, max);
            window->drop_sinks();
        });
        return;
    }
    if (!lctx) {
        broken = true;
        refuse("seq_cp between streams before the context's first batch; call xkv_attach, or decode a token first");
        return;
    }
    guard("seq_cp", true, [&] {
        settle();
        window->copy(lctx, seq_id_src, seq_id_dst);
        tables[s1].copy(tables[s0], seq_id_dst);
        flow->copy(s0, s1);
        if (!whole) {
            seq_rm_one(seq_id_dst, 0, p0);
            seq_rm_one(seq_id_dst, p1, max);
            drop_unused();
        }
    });
}

void llama_kv_cache_xkv::seq_cp_in_stream(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    const uint32_t stream = get_stream(seq_id_src);
    auto &         table  = tables[stream];

    settle();
    drop_copies(seq_id_src, seq_id_dst, p0, p1);
    window->drop_sinks(); // before their cells are others'
    get_window()->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    for (uint32_t ic : table.find(seq_id_src, p0, p1)) {
        const auto & chunk = table[ic];
        if (chunk.seqs.test(seq_id_dst)) {
            continue;
        }
        if (chunk.first() >= p0 && chunk.end() <= p1) {
            table.seq_add(ic, seq_id_dst);
            continue;
        }
        if (flow->n_free(stream, false) > 0) {
            table.seq_add(flow->split(lctx, stream, ic, p0, p1), seq_id_dst);
            continue;
        }
        flow->restore(lctx, stream, ic, seq_id_dst, p0, p1);
    }
}

// An earlier copy may have given a sequence the same tokens in other places, of a chunk that was cut.
void llama_kv_cache_xkv::drop_copies(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    const auto & table = tables[get_stream(seq_id_src)];

    std::vector<llama_pos> list;
    for (const auto & token : window->tokens(seq_id_src)) {
        if (token.pos >= p0 && token.pos < p1 && !token.seqs.test(seq_id_dst)) {
            list.push_back(token.pos);
        }
    }
    for (uint32_t ic : table.find(seq_id_src, p0, p1)) {
        for (uint16_t off : table[ic].offsets) {
            if (table[ic].pos + off >= p0 && table[ic].pos + off < p1 && !table[ic].seqs.test(seq_id_dst)) {
                list.push_back(table[ic].pos + off);
            }
        }
    }
    std::sort(list.begin(), list.end());
    for (size_t i = 0, n; i < list.size(); i += n) {
        for (n = 1; i + n < list.size() && list[i + n] == list[i] + (llama_pos) n; ++n) {
        }
        bool changes = true;
        make_room(seq_id_dst, list[i], list[i] + n, changes);
        seq_rm_one(seq_id_dst, list[i], list[i] + n);
    }
}

void llama_kv_cache_xkv::seq_keep(llama_seq_id seq_id) noexcept {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        broken = true;
        refuse("seq_keep of sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
        return;
    }
    guard("seq_keep", true, [&] {
        get_window()->seq_keep(seq_id);
        tables[get_stream(seq_id)].seq_keep(seq_id);
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (get_stream(s) != get_stream(seq_id)) {
                seq_rm_one(s, 0, std::numeric_limits<llama_pos>::max());
            }
        }
        drop_unused();
        start_over();
    });
}

bool llama_kv_cache_xkv::get_can_shift() const noexcept {
    return get_window()->get_can_shift();
}

void llama_kv_cache_xkv::refuse_positions(const char * what, const char * why) noexcept {
    broken = true;
    refuse("%s: %s; clear the cache and evaluate the prompt again", what, why);
}

// whether positions of a sequence can change; says why not
bool llama_kv_cache_xkv::check_positions(const char * what, llama_seq_id seq_id) noexcept {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        broken = true;
        refuse("%s of sequence %d, expected 0 to n_seq_max - 1 = %u", what, seq_id, n_seq_max - 1);
        return false;
    }
    if (!get_can_shift()) {
        refuse_positions(what, setup.model.hparams.n_pos_per_embd() > 1 ?
                                   "the model's positions have several parts (M-RoPE), which llama.cpp does not shift" :
                                   "llama.cpp does not shift positions of this architecture");
        return false;
    }
    return true;
}

void llama_kv_cache_xkv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) noexcept {
    xkv_normalize(p0, p1);
    if (shift == 0 || p0 >= p1 || !check_positions("seq_add", seq_id)) {
        return;
    }
    const llama_pos last = std::min<int64_t>((int64_t) p1 - 1, seq_pos_max(seq_id));
    if (last >= 0 && (int64_t) last + shift > XKV_MAX_POS) {
        broken = true;
        refuse("seq_add of %d to positions up to %d of sequence %d, expected at most %d after it", shift, last, seq_id, XKV_MAX_POS);
        return;
    }
    guard("seq_add", true, [&] {
        if (p0 < -(int64_t) shift) {
            const llama_pos end     = std::min<int64_t>(p1, -(int64_t) shift); // below 0 there is nothing
            bool            changes = true;
            make_room(seq_id, p0, end, changes);
            seq_rm_one(seq_id, p0, end);
        }
        auto & table = tables[get_stream(seq_id)];
        part(seq_id, p0, p1);
        for (uint32_t ic : table.find(seq_id, p0, p1)) {
            table.move(ic, shift);
        }
        get_window()->seq_add(seq_id, p0, p1, shift);
        settle();
        drop_unused();
    });
}

void llama_kv_cache_xkv::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) noexcept {
    xkv_normalize(p0, p1);
    if (d == 1 || p0 >= p1 || !check_positions("seq_div", seq_id)) {
        return;
    }
    if (d < 1) {
        broken = true;
        refuse("seq_div of sequence %d by %d, expected 1 or more", seq_id, d);
        return;
    }
    guard("seq_div", true, [&] {
        const uint32_t stream = get_stream(seq_id);
        part(seq_id, p0, p1);
        for (uint32_t ic : tables[stream].find(seq_id, p0, p1)) {
            flow->divide(lctx, stream, ic, d);
        }
        window->seq_div(seq_id, p0, p1, d);
        settle();
    });
}

void llama_kv_cache_xkv::part(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const uint32_t stream = get_stream(seq_id);
    const auto &   table  = tables[stream];

    const auto find_cut = [&] {
        auto res = table.find(seq_id, p0, p1);
        res.erase(std::remove_if(res.begin(), res.end(), [&](uint32_t ic) { return table[ic].slots(p0, p1, false).empty(); }), res.end());
        return res;
    };
    for (uint32_t ic : find_cut()) {
        if (lctx && table[ic].n <= window->n_free(seq_id, 0, 0)) {
            flow->to_window(lctx, stream, ic);
        }
    }
    // room for all of them first: packing puts parts together again
    auto list = find_cut();
    while (flow->n_free(stream, false) < list.size()) {
        flow->need_free(lctx, stream, list.size());
        list = find_cut();
    }
    for (uint32_t ic : list) {
        flow->split(lctx, stream, ic, p0, p1);
    }
}

llama_pos llama_kv_cache_xkv::seq_pos_min(llama_seq_id seq_id) const noexcept {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        return -1;
    }
    const llama_pos exact  = get_window()->seq_pos_min(seq_id);
    const llama_pos stored = tables[get_stream(seq_id)].pos_min(seq_id);
    return exact < 0 ? stored : stored < 0 ? exact : std::min(exact, stored);
}

llama_pos llama_kv_cache_xkv::seq_pos_max(llama_seq_id seq_id) const noexcept {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        return -1;
    }
    return std::max(get_window()->seq_pos_max(seq_id), tables[get_stream(seq_id)].pos_max(seq_id));
}

void llama_kv_cache_xkv::seq_tokens(llama_seq_id seq_id, uint32_t & n_exact, uint32_t & n_stored) const {
    n_exact  = window->n_token(seq_id);
    n_stored = tables[get_stream(seq_id)].n_token(seq_id);
}
