// What changes chunks that are stored: tokens that are removed from inside, parts that get chunks of their own, positions that are
// shifted or divided, and chunks that are packed so that others become free.

#include "flow/xkv-flow.h"

#include "llama-context.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

// offsets of tokens from their chunk's frame
static const llama_pos XKV_MAX_SPAN = std::numeric_limits<uint16_t>::max();

// slots of a chunk as sources of another
static std::vector<xkv_source> xkv_sources(uint32_t ic, const std::vector<uint32_t> & slots) {
    std::vector<xkv_source> res;
    for (uint32_t i : slots) {
        res.push_back({ ic, i, 0 });
    }
    return res;
}

void xkv_flow::shift(llama_context * lctx) {
    for (uint32_t s = 0; s < tables.size(); ++s) {
        std::vector<uint32_t>  cells;
        std::vector<llama_pos> by;
        for (const auto & [cell, delta] : window.take_shift(s)) {
            cells.push_back(cell);
            by.push_back(delta);
        }
        if (!cells.empty()) {
            llama_synchronize(lctx);
            flush.turn(lctx, s, cells, by);
        }
    }
}

std::vector<uint32_t> xkv_flow::free_chunks(uint32_t stream, size_t n) const {
    auto res = tables[stream].free(n);
    res.erase(std::remove_if(res.begin(), res.end(), [&](uint32_t ic) { return ic >= store.n_slot_now() / store.n_chunk; }), res.end());
    return res;
}

size_t xkv_flow::n_free(uint32_t stream, bool pack) const {
    const auto & table = tables[stream];

    size_t res = free_chunks(stream, table.size()).size();
    for (const auto & list : by_sequences(stream)) {
        const uint32_t n = std::accumulate(list.begin(), list.end(), 0u, [&](uint32_t sum, uint32_t ic) { return sum + table[ic].n; });
        res += pack ? list.size() - (n + store.n_chunk - 1) / store.n_chunk : 0;
    }
    return res;
}

std::vector<std::vector<uint32_t>> xkv_flow::by_sequences(uint32_t stream) const {
    const auto & table = tables[stream];

    std::map<std::string, std::vector<uint32_t>> sets;
    for (uint32_t ic : table.used()) {
        sets[table[ic].seqs.to_string()].push_back(ic);
    }
    std::vector<std::vector<uint32_t>> res;
    for (auto & [seqs, list] : sets) {
        std::sort(list.begin(), list.end(), [&](uint32_t a, uint32_t b) { return table[a].first() < table[b].first(); });
        res.push_back(std::move(list));
    }
    return res;
}

std::vector<uint32_t> xkv_flow::find_run(uint32_t stream) const {
    const auto & table = tables[stream];

    std::vector<uint32_t> res;
    for (const auto & list : by_sequences(stream)) {
        for (size_t i = 0; i < list.size(); ++i) {
            size_t    n   = table[list[i]].n;
            llama_pos low = table[list[i]].pos; // any of them may give a chunk its frame
            for (size_t j = i + 1; j < list.size() && (res.empty() || j - i + 1 < res.size()); ++j) {
                const auto & chunk = table[list[j]];
                low                = std::min(low, chunk.pos);
                if (chunk.first() + 1 < table[list[j - 1]].end() || chunk.end() - low > XKV_MAX_SPAN) {
                    break;
                }
                n += chunk.n;
                if (n <= (j - i) * store.n_chunk) {
                    res.assign(list.begin() + i, list.begin() + j + 1);
                    break;
                }
            }
        }
    }
    return res;
}

size_t xkv_flow::make_free(llama_context * lctx, uint32_t stream, size_t n) {
    while (free_chunks(stream, n).size() < n) {
        const auto run = lctx ? find_run(stream) : std::vector<uint32_t>();
        if (run.empty()) {
            break;
        }
        change("packing chunks", [&] { pack(lctx, stream, run); });
    }
    return free_chunks(stream, n).size();
}

void xkv_flow::need_free(llama_context * lctx, uint32_t stream, size_t n) {
    size_t found = make_free(lctx, stream, n);
    while (found < n && lctx && tables.size() == 1 && store.stage() + 1 < store.n_stage()) {
        change("a change of stage", [&] { enter_stage(lctx, stream, store.stage() + 1, {}); });
        found = make_free(lctx, stream, n);
    }
    if (found < n) {
        xkv_throw(XKV_STATUS_UNSUPPORTED,
                  "%zu chunks of the store are needed for parts of chunks, and %zu are free%s; raise n_ctx, or remove whole sequences", n,
                  found, lctx ? "" : " before the context's first batch (xkv_attach does for it)");
    }
}

void xkv_flow::write(llama_context * lctx, uint32_t stream, uint32_t to, const std::vector<xkv_source> & sources) {
    if (lctx) {
        llama_synchronize(lctx);
    }
    bool moved = false; // not only turned
    for (size_t i = 0; i < sources.size(); ++i) {
        moved = moved || sources[i].ic != to || sources[i].slot != i;
    }
    for (uint32_t ig = 0; ig < store.groups().size(); ++ig) {
        for (auto kd : store.kinds(ig)) {
            const bool turn =
                kd == xkv_store::kind::K && std::any_of(sources.begin(), sources.end(), [](const xkv_source & src) { return src.by != 0; });
            if (moved || turn) {
                auto rows = gather(kd, ig, stream, sources);
                if (turn) {
                    turn_rows(lctx, ig, stream, sources, rows);
                }
                // slots beyond the last token repeat it, as when it was compressed
                const uint32_t rank = store.groups()[ig].rank[kd];
                rows.resize((size_t) store.n_chunk * rank);
                for (size_t i = sources.size(); i < store.n_chunk; ++i) {
                    std::copy_n(rows.begin() + (sources.size() - 1) * rank, rank, rows.begin() + i * rank);
                }
                store.set_coef(kd, ig, stream, to, rows.data());
            }
        }
    }
    flush.release();
}

xkv_floats xkv_flow::gather(xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<xkv_source> & sources) const {
    const uint32_t rank = store.groups()[ig].rank[kd];

    xkv_floats res(sources.size() * rank);
    xkv_floats coef;
    for (size_t i = 0; i < sources.size(); ++i) {
        if (i == 0 || sources[i].ic != sources[i - 1].ic) {
            coef = store.get_coef(kd, ig, stream, sources[i].ic);
        }
        std::copy_n(coef.begin() + (size_t) sources[i].slot * rank, rank, res.begin() + i * rank);
    }
    return res;
}

void xkv_flow::turn_rows(llama_context * lctx, uint32_t ig, uint32_t stream, const std::vector<xkv_source> & sources, xkv_floats & rows) {
    const uint32_t rank = store.groups()[ig].rank[xkv_store::kind::K];

    std::vector<size_t>    list; // those that are turned: others stay as they are
    std::vector<llama_pos> by;
    xkv_floats             part;
    for (size_t i = 0; i < sources.size(); ++i) {
        if (sources[i].by != 0) {
            list.push_back(i);
            by.push_back(sources[i].by);
            part.insert(part.end(), rows.begin() + i * rank, rows.begin() + (i + 1) * rank);
        }
    }
    part = flush.turned(lctx, ig, stream, part, by);
    for (size_t i = 0; i < list.size(); ++i) {
        std::copy_n(part.begin() + i * rank, rank, rows.begin() + list[i] * rank);
    }
}

void xkv_flow::pack(llama_context * lctx, uint32_t stream, const std::vector<uint32_t> & run) {
    auto & table = tables[stream];

    std::vector<xkv_source> tokens;
    for (uint32_t ic : run) {
        std::vector<uint32_t> slots(table[ic].n);
        std::iota(slots.begin(), slots.end(), 0);
        const auto part = xkv_sources(ic, slots);
        tokens.insert(tokens.end(), part.begin(), part.end());
    }
    // the tokens that a chunk has now are those of chunks before it by then, so that it can be written
    std::vector<xkv_chunk> chunks;
    for (size_t first = 0; first < tokens.size(); first += store.n_chunk) {
        std::vector<xkv_source> sources(tokens.begin() + first, tokens.begin() + std::min<size_t>(tokens.size(), first + store.n_chunk));

        const auto & from  = table[sources[0].ic];
        xkv_chunk    chunk = { from.pos, (uint32_t) sources.size(), from.seqs, {} };
        chunk.pos += sources[0].slot == 0 ? 0 : from.offsets[sources[0].slot];
        for (auto & src : sources) {
            const auto & old = table[src.ic];
            chunk.offsets.push_back(old.pos + old.offsets[src.slot] - chunk.pos);
            src.by = old.pos - chunk.pos;
        }
        write(lctx, stream, run[chunks.size()], sources);
        chunks.push_back(std::move(chunk));
    }
    for (size_t i = 0; i < run.size(); ++i) {
        table.put(run[i], i < chunks.size() ? std::move(chunks[i]) : xkv_chunk());
    }
}

void xkv_flow::keep(llama_context * lctx, uint32_t stream, uint32_t ic, const std::vector<uint32_t> & slots) {
    if (!slots.empty() && slots.back() >= slots.size()) {
        change("cutting a chunk", [&] { write(lctx, stream, ic, xkv_sources(ic, slots)); });
    }
    tables[stream].take(ic, slots);
}

uint32_t xkv_flow::split(llama_context * lctx, uint32_t stream, uint32_t ic, llama_pos p0, llama_pos p1) {
    const auto part = tables[stream][ic].slots(p0, p1);
    const auto rest = tables[stream][ic].slots(p0, p1, false);
    if (rest.empty()) {
        return ic;
    }
    const auto free = free_chunks(stream, 1);
    if (free.empty()) {
        xkv_throw(XKV_STATUS_UNSUPPORTED, "no chunk of the store is free for a part of another; raise n_ctx, or remove whole sequences");
    }
    const uint32_t to = free[0];
    write(lctx, stream, to, xkv_sources(ic, part));
    tables[stream].put(to, xkv_chunk(tables[stream][ic]));
    tables[stream].take(to, part);
    keep(lctx, stream, ic, rest);
    return to;
}

void xkv_flow::to_window(llama_context * lctx, uint32_t stream, uint32_t ic) {
    const auto chunk = tables[stream][ic];

    llama_seq_id first = 0;
    while (!chunk.seqs.test(first)) {
        first++;
    }
    window.share(stream, restore(lctx, stream, ic, first, chunk.first(), chunk.end()), chunk.seqs);
    tables[stream].put(ic, xkv_chunk());
}

void xkv_flow::divide(llama_context * lctx, uint32_t stream, uint32_t ic, int d) {
    const auto old = tables[stream][ic];
    if (!lctx) {
        xkv_throw(
            XKV_STATUS_UNSUPPORTED,
            "positions of stored tokens cannot be divided before the context's first batch; call xkv_attach, or decode a token first");
    }
    xkv_chunk               chunk = { old.first() / d, old.n, old.seqs, {} };
    std::vector<xkv_source> sources;
    for (uint32_t i = 0; i < old.n; ++i) {
        chunk.offsets.push_back((old.pos + old.offsets[i]) / d - chunk.pos);
        sources.push_back({ ic, i, (llama_pos) chunk.offsets[i] - (llama_pos) old.offsets[i] });
    }
    change("dividing positions", [&] { write(lctx, stream, ic, sources); });
    tables[stream].put(ic, std::move(chunk));
}
