// Operations on sequences: what llama_memory_i asks of a cache, over window and chunks together.

#include "base/xkv-error.h"
#include "cache/xkv-cache.h"
#include "flow/xkv-flow.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>

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
    bool changed = false;
    return guard("seq_rm", changed, [&] {
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (seq_id < 0 || s == seq_id) {
                check_room(s, p0, p1);
                changed = true;
                seq_rm_one(s, p0, p1);
            }
        }
        drop_unused();
        start_over();
    });
}

void llama_kv_cache_xkv::check_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const auto & table = tables[get_stream(seq_id)];

    const uint32_t n_free = window->n_free(seq_id, p0, p1);

    uint32_t n_rest = 0;
    for (uint32_t ic : table.find(seq_id, p0, p1)) {
        const auto & chunk = table[ic];
        n_rest += std::count_if(chunk.offsets.begin(), chunk.offsets.end(),
                                [&](uint16_t off) { return chunk.pos + off < p0 || chunk.pos + off >= p1; });
    }
    if (n_rest > 0 && !lctx) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "a chunk cannot be cut before the context's first batch; call xkv_attach, or decode a token first");
    }
    if (n_rest > n_free) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "what remains of the cut chunks is %u tokens, the window has room for %u", n_rest, n_free);
    }
}

void llama_kv_cache_xkv::seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const uint32_t stream = get_stream(seq_id);

    get_window()->seq_rm(seq_id, p0, p1);

    for (uint32_t ic : tables[stream].find(seq_id, p0, p1)) {
        const llama_pos pos = tables[stream][ic].pos;
        const llama_pos end = tables[stream][ic].end();

        // what remains of a cut chunk becomes exact again, so that chunks stay whole
        if (pos < p0) {
            flow->restore(lctx, stream, ic, seq_id, pos, p0);
        }
        if (end > p1) {
            flow->restore(lctx, stream, ic, seq_id, p1, end);
        }
        tables[stream].seq_rm(ic, seq_id);
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

    // sequences that have streams of their own are copied whole
    if (seq_pos_max(seq_id_src) < 0) {
        guard("seq_cp", true, [&] {
            seq_rm_one(seq_id_dst, 0, std::numeric_limits<llama_pos>::max());
            window->drop_sinks();
        });
        return;
    }
    if (p0 > seq_pos_min(seq_id_src) || p1 <= seq_pos_max(seq_id_src)) {
        broken = true;
        refuse("seq_cp of positions %d to %d of sequence %d to %d: only whole sequences can be copied between streams; use kv_unified", p0,
               p1, seq_id_src, seq_id_dst);
        return;
    }
    if (!lctx) {
        broken = true;
        refuse("seq_cp between streams before the context's first batch; call xkv_attach, or decode a token first");
        return;
    }
    guard("seq_cp", true, [&] {
        window->copy(lctx, seq_id_src, seq_id_dst);
        tables[s1].copy(tables[s0], seq_id_dst);
        flow->copy(s0, s1);
    });
}

void llama_kv_cache_xkv::seq_cp_in_stream(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    auto & table = tables[get_stream(seq_id_src)];

    drop_copies(seq_id_src, seq_id_dst, p0, p1);
    get_window()->seq_cp(seq_id_src, seq_id_dst, p0, p1);
    for (uint32_t ic : table.find(seq_id_src, p0, p1)) {
        const auto & chunk = table[ic];
        if (chunk.seqs.test(seq_id_dst)) {
            continue;
        }
        if (chunk.pos >= p0 && chunk.end() <= p1) {
            table.seq_add(ic, seq_id_dst);
            continue;
        }
        flow->restore(lctx, get_stream(seq_id_src), ic, seq_id_dst, p0, p1);
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
        drop_unused();
        start_over();
    });
}

void llama_kv_cache_xkv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) noexcept {
    if (shift == 0) {
        return;
    }
    broken = true;
    refuse("shifting positions (sequence %d, %d to %d by %d) is not supported yet with an xkv cache; clear the cache and evaluate the "
           "prompt again",
           seq_id, p0, p1, shift);
}

void llama_kv_cache_xkv::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) noexcept {
    if (d == 1) {
        return;
    }
    broken = true;
    refuse("dividing positions (sequence %d, %d to %d by %d) is not supported with an xkv cache; clear the cache and evaluate the prompt "
           "again",
           seq_id, p0, p1, d);
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
