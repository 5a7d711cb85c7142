#include "flow/xkv-flow.h"

#include "base/xkv-memory.h"

#include "flow/xkv-online.h"
#include "format/xkv-sidecar.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <algorithm>

xkv_flow::xkv_flow(const xkv_setup & setup, xkv_store & store, xkv_window & window, std::vector<xkv_chunk_table> & tables) :
    setup(setup), store(store), window(window), tables(tables), flush(setup, store, window) {
    if (setup.config.online) {
        online = std::make_unique<xkv_online_bases>(setup, store, tables, flush);
    }
}

xkv_flow::~xkv_flow() = default;

void xkv_flow::leave(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t stream = window.get_stream(seq_id);

    bool all = false;
    while (!all) {
        auto jobs = select(lctx, seq_id);
        if (jobs.empty()) {
            return;
        }
        all = make_room(lctx, stream, jobs);
        change("an update of the bases", [&] { adapt(lctx, stream, jobs); });
        flush.compress(lctx, stream, jobs);
        commit(stream, jobs);
        xkv_trim();
    }
}

xkv_flow::jobs_t xkv_flow::select(llama_context * lctx, llama_seq_id seq_id) {
    const uint32_t stream = window.get_stream(seq_id);
    const auto &   config = setup.config;

    auto jobs = xkv_select(window.tokens(seq_id), { config.n_sink, config.n_window, store.n_chunk });

    const uint32_t n_sink = window.n_sink(seq_id);
    if (jobs.empty() || n_sink >= config.n_text_sink) {
        return jobs;
    }
    const auto cells = xkv_job_cells(jobs);
    const auto sinks = xkv_select_sinks(cells, flush.value_drain(lctx, stream, cells), config.n_text_sink - n_sink);
    for (uint32_t cell : sinks) {
        window.set_sink(stream, cell);
    }
    xkv_leave_out(jobs, sinks);
    return jobs;
}

bool xkv_flow::make_room(llama_context * lctx, uint32_t stream, jobs_t & jobs) {
    const size_t n_used = tables[stream].used().size();
    const size_t n_job  = jobs.size();

    const uint32_t stage = xkv_select_stage(store.stage_slots(), n_used == 0 ? 0 : store.stage(), store.n_chunk, n_used + n_job);
    const uint32_t next  = std::min(stage, store.n_stage() - 1);
    if (next != store.stage()) {
        change("a change of stage", [&] { n_used == 0 ? restart(next) : enter_stage(lctx, stream, next, jobs); });
    }
    // where holes have left chunks that are not full, there can be more than the last stage has
    const size_t n = make_free(lctx, stream, n_job);
    if (n == 0) {
        xkv_throw(XKV_STATUS_INTERNAL, "no room for %zu more chunks: %zu of %zu are in use", n_job, n_used, tables[stream].size());
    }
    jobs.resize(n);

    const auto free = free_chunks(stream, n);
    for (size_t i = 0; i < n; ++i) {
        jobs[i].ic = free[i];
    }
    return n == n_job;
}

void xkv_flow::enter_stage(llama_context * lctx, uint32_t stream, uint32_t stage, const jobs_t & jobs) {
    llama_synchronize(lctx);
    auto next = store.begin(stage, tables[stream].n_slot());

    if (online) {
        online->begin_stage(stream, jobs);
    }
    const auto chunks   = tables[stream].used();
    const int  n_thread = lctx->get_cparams().n_threads_batch;
    for (uint32_t ig = 0; ig < next.groups.size(); ++ig) {
        store.begin_group(next, ig);
        const auto turns = online ? online->enter_stage(lctx, stream, jobs, next, ig) : keep_calibrated(stream, next, ig, n_thread);
        carry_peak       = std::max(carry_peak, xkv_carry_stage(store, ig, stream, chunks, turns, next, n_thread));
        store.end_group(next, ig);
        xkv_trim();
    }
    store.commit(std::move(next));
}

xkv_recodes xkv_flow::keep_calibrated(uint32_t stream, const xkv_store::layout & next, uint32_t ig, int n_thread) {
    xkv_recodes turns;
    for (auto kd : store.kinds(ig)) {
        turns[kd] = xkv_keep_basis(store, kd, ig, stream, setup.sidecar.basis(ig, kd, next.groups[ig].rank[kd]), next, n_thread);
    }
    return turns;
}

void xkv_flow::adapt(llama_context * lctx, uint32_t stream, const jobs_t & jobs) {
    if (online) {
        online->observe(lctx, stream, jobs);
    }
}

void xkv_flow::commit(uint32_t stream, const jobs_t & jobs) {
    for (const auto & job : jobs) {
        tables[stream].put(job.ic, job.chunk());
    }
    window.remove(stream, xkv_job_cells(jobs));
    if (online) {
        online->count(stream, jobs);
    }
}

std::vector<uint32_t> xkv_flow::restore(llama_context * lctx, uint32_t stream, uint32_t ic, llama_seq_id seq_id, llama_pos p0,
                                        llama_pos p1) {
    const auto & chunk = tables[stream][ic];
    if (!lctx) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "a chunk cannot be cut before the context's first batch; call xkv_attach, or decode a token first");
    }

    const auto slots = chunk.slots(p0, p1);
    const auto cells = window.free_cells(stream, slots.size());

    flush.restore(lctx, stream, ic, chunk.pos, slots, cells);

    for (size_t i = 0; i < slots.size(); ++i) {
        window.put(stream, cells[i], chunk.pos + chunk.offsets[slots[i]], seq_id);
    }
    return cells;
}

void xkv_flow::start_over(llama_context * lctx, uint32_t stream) {
    auto &     table = tables[stream];
    const auto used  = table.used();
    if (tables.size() == 1 && used.empty()) {
        reset(stream); // bases that followed what was removed
        return;
    }
    if (tables.size() > 1 || xkv_select_stage(store.stage_slots(), 0, store.n_chunk, used.size()) >= store.stage() ||
        table.n_token() + window.n_used(stream) > window.size()) {
        return;
    }
    change("a return to an earlier stage", [&] {
        for (uint32_t ic : used) {
            to_window(lctx, stream, ic);
        }
        restart(0);
    });
    xkv_trim();
}

void xkv_flow::restart(uint32_t stage) {
    store.restart(stage);
    for (uint32_t s = 0; online && s < tables.size(); ++s) {
        online->reset(s);
    }
}

void xkv_flow::reset(uint32_t stream) {
    // the first stage begins before the next tokens are stored: the bases of a later one are not needed again
    if (tables.size() == 1 && store.stage() > 0) {
        restart(0);
    } else if (online) {
        store.reset_bases(stream);
        online->reset(stream);
    }
    xkv_trim();
}

void xkv_flow::copy(uint32_t src, uint32_t dst) {
    store.copy_stream(src, dst);
    if (online) {
        online->copy(src, dst);
    }
}

size_t xkv_flow::peak() const {
    return std::max(flush.peak(), store.staged_peak() + std::max(carry_peak, online ? online->peak() : 0));
}

xkv_online_info xkv_flow::info(uint32_t stream) const {
    return online ? online->info(stream) : xkv_online_info();
}
