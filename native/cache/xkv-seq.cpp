// Operations on sequences: what llama_memory_i asks of a cache, over window and chunks together.

#include "cache/xkv-cache.h"
#include "base/xkv-error.h"
#include "flow/xkv-flush.h"
#include "flow/xkv-online.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <limits>

static void xkv_normalize(llama_pos & p0, llama_pos & p1) {
    p0 = p0 < 0 ? 0 : p0;
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
}

bool llama_kv_cache_xkv::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    xkv_normalize(p0, p1);

    if (seq_id >= (llama_seq_id) n_seq_max) {
        refuse("seq_rm: sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
        return false;
    }
    bool changed = false;
    try {
        for (llama_seq_id s = 0; s < (llama_seq_id) n_seq_max; ++s) {
            if (seq_id < 0 || s == seq_id) {
                check_room(s, p0, p1);
                changed = true;
                seq_rm_one(s, p0, p1);
            }
        }
    } catch (const std::exception & err) {
        broken = changed;
        refuse("seq_rm of sequence %d from %d: %s", seq_id, p0, err.what());
        return false;
    }
    drop_unused();
    return true;
}

void llama_kv_cache_xkv::check_room(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const uint32_t stream = get_stream(seq_id);

    uint32_t n_free = 0;
    for (uint32_t i = 0; i < cells(stream).size(); ++i) {
        const auto & wcells = cells(stream);
        n_free += wcells.is_empty(i) || (wcells.seq_count(i) == 1 && wcells.seq_has(i, seq_id) && wcells.pos_in(i, p0, p1));
    }
    uint32_t n_rest = 0;
    for (const auto & chunk : chunks[stream]) {
        if (chunk.n > 0 && chunk.seqs.test(seq_id) && chunk.end() > p0 && chunk.pos < p1) {
            n_rest += std::count_if(chunk.offsets.begin(), chunk.offsets.end(), [&](uint16_t off) {
                return chunk.pos + off < p0 || chunk.pos + off >= p1;
            });
        }
    }
    if (n_rest > n_free) {
        xkv_throw(XKV_STATUS_NO_MEMORY, "what remains of the cut chunks is %u tokens, the window has room for %u", n_rest, n_free);
    }
}

void llama_kv_cache_xkv::seq_rm_one(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const uint32_t stream = get_stream(seq_id);

    window->seq_rm(seq_id, p0, p1);

    for (uint32_t ic = 0; ic < chunks[stream].size(); ++ic) {
        auto & chunk = chunks[stream][ic];

        const llama_pos end = chunk.end();
        if (chunk.n == 0 || !chunk.seqs.test(seq_id) || end <= p0 || chunk.pos >= p1) {
            continue;
        }
        // what remains of a cut chunk becomes exact again, so that chunks stay whole
        if (chunk.pos < p0) {
            restore(stream, ic, seq_id, chunk.pos, p0);
        }
        if (end > p1) {
            restore(stream, ic, seq_id, p1, end);
        }
        chunk.seqs.reset(seq_id);
        if (chunk.seqs.none()) {
            chunk = xkv_chunk();
        }
    }
}

void llama_kv_cache_xkv::restore(uint32_t stream, uint32_t ic, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const auto & chunk = chunks[stream][ic];

    auto & wcells = cells(stream);

    std::vector<uint32_t> slots;
    std::vector<uint32_t> idxs;

    uint32_t idx = 0;
    for (uint32_t i = 0; i < chunk.n; ++i) {
        const llama_pos p = chunk.pos + chunk.offsets[i];
        if (p < p0 || p >= p1) {
            continue;
        }
        while (idx < wcells.size() && !wcells.is_empty(idx)) {
            idx++;
        }
        if (idx == wcells.size()) {
            xkv_throw(XKV_STATUS_NO_MEMORY, "the window of %u tokens has no room for the rest of a cut chunk", wcells.size());
        }
        slots.push_back(i);
        idxs.push_back(idx++);
    }

    flusher->restore(lctx, stream, ic, chunk.pos, slots, idxs);

    for (size_t i = 0; i < idxs.size(); ++i) {
        wcells.pos_set(idxs[i], chunk.pos + chunk.offsets[slots[i]]);
        wcells.seq_add(idxs[i], seq_id);
    }
}

void llama_kv_cache_xkv::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
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
        window->seq_cp(seq_id_src, seq_id_dst, p0, p1);
        for (uint32_t ic = 0; ic < chunks[s0].size(); ++ic) {
            auto & chunk = chunks[s0][ic];

            const llama_pos end = chunk.end();
            if (chunk.n == 0 || !chunk.seqs.test(seq_id_src) || end <= p0 || chunk.pos >= p1) {
                continue;
            }
            if (chunk.seqs.test(seq_id_dst)) {
                continue;
            }
            if (chunk.pos >= p0 && end <= p1) {
                chunk.seqs.set(seq_id_dst);
                continue;
            }
            try {
                window->seq_rm(seq_id_dst, std::max(p0, chunk.pos), std::min(p1, end)); // of an earlier copy
                restore(s0, ic, seq_id_dst, p0, p1);
            } catch (const std::exception & err) {
                broken = true;
                refuse("seq_cp of sequence %d to %d: %s", seq_id_src, seq_id_dst, err.what());
                return;
            }
        }
        return;
    }

    // sequences that have streams of their own are copied whole
    if (seq_pos_max(seq_id_src) < 0) {
        seq_rm_one(seq_id_dst, 0, std::numeric_limits<llama_pos>::max());
        return;
    }
    if (p0 > seq_pos_min(seq_id_src) || p1 <= seq_pos_max(seq_id_src)) {
        broken = true;
        refuse("seq_cp of positions %d to %d of sequence %d to %d: only whole sequences can be copied between streams; use kv_unified",
               p0, p1, seq_id_src, seq_id_dst);
        return;
    }
    llama_synchronize(lctx);
    window->seq_cp(seq_id_src, seq_id_dst, -1, -1);
    // copied now: what follows may cut a chunk and write to the window
    const auto update = window->init_update(lctx, false);
    if (update->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
        update->apply();
    }
    chunks[s1]     = chunks[s0];
    text_sinks[s1] = text_sinks[s0];
    for (auto & chunk : chunks[s1]) {
        chunk.seqs.reset();
        chunk.seqs.set(seq_id_dst, chunk.n > 0);
    }
    store->copy_stream(s0, s1);
    if (online) {
        online->copy(s0, s1);
    }
}

void llama_kv_cache_xkv::seq_keep(llama_seq_id seq_id) {
    if (seq_id < 0 || seq_id >= (llama_seq_id) n_seq_max) {
        broken = true;
        refuse("seq_keep of sequence %d, expected below n_seq_max = %u", seq_id, n_seq_max);
        return;
    }
    const uint32_t stream = get_stream(seq_id);

    window->seq_keep(seq_id);
    for (auto & chunk : chunks[stream]) {
        const bool keep = chunk.n > 0 && chunk.seqs.test(seq_id);
        chunk = keep ? xkv_chunk { chunk.pos, chunk.n, xkv_chunk::seq_set_t().set(seq_id), chunk.offsets } : xkv_chunk();
    }
    drop_unused();
}

void llama_kv_cache_xkv::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift == 0) {
        return;
    }
    broken = true;
    refuse("shifting positions (sequence %d, %d to %d by %d) is not supported yet with an xkv cache; clear the cache and evaluate the prompt again",
           seq_id, p0, p1, shift);
}

void llama_kv_cache_xkv::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d == 1) {
        return;
    }
    broken = true;
    refuse("dividing positions (sequence %d, %d to %d by %d) is not supported with an xkv cache; clear the cache and evaluate the prompt again",
           seq_id, p0, p1, d);
}

llama_pos llama_kv_cache_xkv::seq_pos_min(llama_seq_id seq_id) const {
    llama_pos res = window->seq_pos_min(seq_id);
    for (const auto & chunk : chunks[get_stream(seq_id)]) {
        if (chunk.n > 0 && chunk.seqs.test(seq_id)) {
            const llama_pos first = chunk.pos + chunk.offsets.front();
            res = res < 0 ? first : std::min(res, first);
        }
    }
    return res;
}

llama_pos llama_kv_cache_xkv::seq_pos_max(llama_seq_id seq_id) const {
    llama_pos res = window->seq_pos_max(seq_id);
    for (const auto & chunk : chunks[get_stream(seq_id)]) {
        if (chunk.n > 0 && chunk.seqs.test(seq_id)) {
            res = std::max(res, chunk.end() - 1);
        }
    }
    return res;
}

void llama_kv_cache_xkv::seq_tokens(llama_seq_id seq_id, uint32_t & n_exact, uint32_t & n_stored) const {
    const uint32_t stream = get_stream(seq_id);

    n_exact  = cells(stream).seq_pos_get(seq_id).size();
    n_stored = 0;
    for (const auto & chunk : chunks[stream]) {
        n_stored += chunk.seqs.test(seq_id) ? chunk.n : 0;
    }
}
