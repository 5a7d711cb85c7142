// How tokens leave the window for the store.

#include "cache/xkv-cache.h"
#include "store/xkv-carry.h"
#include "base/xkv-error.h"
#include "flow/xkv-flush.h"
#include "flow/xkv-online.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"

#include <algorithm>

// A token whose V has less than this share of the mean energy in some layer is an attention sink: most of the attention of
// later tokens goes to the few of them, so that what compression loses on them costs more than on all others together.
static const float XKV_TEXT_SINK = 0.05f;

bool llama_kv_cache_xkv::flush(const llama_ubatch & ubatch) {
    try {
        std::vector<uint32_t> n_new(chunks.size(), 0);
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            n_new[get_stream(ubatch.seq_id[i][0])]++;
        }
        // tokens stay exact until their room is needed; sequences without new tokens make room as well
        for (llama_seq_id seq_id = 0; seq_id < (llama_seq_id) n_seq_max; ++seq_id) {
            const uint32_t stream = get_stream(seq_id);
            if (n_new[stream] > 0 && cells(stream).get_used() + n_new[stream] > window->get_size()) {
                flush_seq(seq_id);
            }
        }
        return true;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        xkv_set_last_error(err.what());
        return false;
    }
}

void llama_kv_cache_xkv::flush_seq(llama_seq_id seq_id) {
    const uint32_t stream  = get_stream(seq_id);
    const uint32_t n_chunk = store->n_chunk;

    std::vector<std::pair<llama_pos, uint32_t>> exact; // position, cell
    for (const auto & pc : cells(stream).seq_pos_get(seq_id)) {
        if (pc.first >= (llama_pos) config.n_sink && !text_sinks[stream][pc.second]) {
            exact.push_back(pc);
        }
    }
    if (exact.size() <= config.n_window) {
        return;
    }
    const size_t n_leave = exact.size() - config.n_window;

    std::vector<xkv_flush::job> jobs;
    for (size_t i = 0; i < n_leave;) {
        // a chunk holds tokens of the same sequences
        size_t end = i + 1;
        while (end < exact.size() && exact[end].first < exact[i].first + (llama_pos) n_chunk &&
               cells(stream).seq_get_all(exact[end].second) == cells(stream).seq_get_all(exact[i].second)) {
            end++;
        }
        if (end > n_leave) {
            break;
        }
        xkv_flush::job job = { 0, exact[i].first, {} };
        for (; i < end; ++i) {
            job.cells.push_back(exact[i].second);
        }
        jobs.push_back(std::move(job));
    }
    keep_text_sinks(seq_id, jobs);
    if (jobs.empty()) {
        return;
    }
    find_chunks(stream, jobs);

    if (online) {
        try {
            online->observe(lctx, stream, jobs);
        } catch (const std::exception & err) {
            broken = true; // bases and coefficients may not belong together any more
            refuse("an update of the bases of sequence %d: %s; clear the cache", seq_id, err.what());
            throw;
        }
    }
    flusher->compress(lctx, stream, jobs);

    for (const auto & job : jobs) {
        auto & chunk = chunks[stream][job.ic];
        chunk.pos  = job.pos;
        chunk.n    = job.cells.size();
        chunk.seqs = cells(stream).seq_get_all(job.cells[0]);
        chunk.offsets.clear();
        for (uint32_t idx : job.cells) {
            chunk.offsets.push_back(cells(stream).pos_get(idx) - job.pos);
            cells(stream).rm(idx);
        }
    }
    window->v_heads[stream] = 0;
}

void llama_kv_cache_xkv::find_chunks(uint32_t stream, std::vector<xkv_flush_job> & jobs) {
    const auto & table = chunks[stream];

    std::vector<uint32_t> used;
    for (uint32_t ic = 0; ic < table.size(); ++ic) {
        if (table[ic].n > 0) {
            used.push_back(ic);
        }
    }
    const size_t n    = used.size() + jobs.size();
    const auto   room = [&](uint32_t stage) { return store->stage_slots(stage)/store->n_chunk; };

    uint32_t stage = used.empty() ? 0 : store->stage();
    while (stage < store->n_stage() && n > room(stage)) {
        stage++;
    }
    if (stage == store->n_stage()) {
        xkv_throw(XKV_STATUS_INTERNAL, "no room for %zu more chunks: %zu of %zu are in use", jobs.size(), used.size(), table.size());
    }
    if (stage != store->stage()) {
        if (used.empty()) {
            restart(stage);
        } else {
            enter_stage(stream, stage, used, jobs);
        }
    }
    uint32_t ic = 0;
    for (auto & job : jobs) {
        while (table[ic].n > 0) {
            ic++;
        }
        job.ic = ic++;
    }
}

void llama_kv_cache_xkv::enter_stage(uint32_t stream, uint32_t stage, const std::vector<uint32_t> & used, const std::vector<xkv_flush_job> & jobs) {
    const auto next = store->begin(stage);
    if (online) {
        online->enter_stage(lctx, stream, jobs, next);
    } else {
        xkv_graph graph;
        for (uint32_t ig = 0; ig < next.groups.size(); ++ig) {
            for (auto kd : { xkv_store::kind::K, xkv_store::kind::V }) {
                const auto turn = store->plain() ? sidecar->basis(ig, kd, next.groups[ig].rank[kd]) : std::vector<float>();
                xkv_carry_over(graph, lctx, *store, kd, ig, stream, used, turn, &next);
            }
        }
    }
    store->commit(next);
}

void llama_kv_cache_xkv::restart(uint32_t stage) {
    store->restart(stage);
    if (online) {
        for (uint32_t s = 0; s < chunks.size(); ++s) {
            online->reset(s);
        }
    }
}

void llama_kv_cache_xkv::keep_text_sinks(llama_seq_id seq_id, std::vector<xkv_flush_job> & jobs) {
    const uint32_t stream = get_stream(seq_id);

    uint32_t n_room = config.n_text_sink;
    for (uint32_t i = 0; i < text_sinks[stream].size(); ++i) {
        n_room -= n_room > 0 && text_sinks[stream][i] && cells(stream).seq_has(i, seq_id);
    }
    if (n_room == 0 || jobs.empty()) {
        return;
    }
    std::vector<uint32_t> idxs;
    for (const auto & job : jobs) {
        idxs.insert(idxs.end(), job.cells.begin(), job.cells.end());
    }
    const auto drain = flusher->value_drain(lctx, stream, idxs);

    std::vector<std::pair<float, uint32_t>> found; // the least values first
    for (size_t i = 0; i < idxs.size(); ++i) {
        if (drain[i] < XKV_TEXT_SINK) {
            found.emplace_back(drain[i], idxs[i]);
        }
    }
    std::sort(found.begin(), found.end());
    for (size_t i = 0; i < std::min<size_t>(found.size(), n_room); ++i) {
        text_sinks[stream][found[i].second] = true;
    }
    for (auto & job : jobs) {
        job.cells.erase(std::remove_if(job.cells.begin(), job.cells.end(), [&](uint32_t idx) { return text_sinks[stream][idx]; }), job.cells.end());
    }
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const xkv_flush_job & job) { return job.cells.empty(); }), jobs.end());
}
