#include "flow/xkv-select.h"

#include <algorithm>
#include <utility>

// A token whose V has less than this share of the mean energy in some layer is an attention sink: most of the attention of
// later tokens goes to the few of them, so that what compression loses on them costs more than on all others together.
static const float XKV_TEXT_SINK = 0.05f;

std::vector<xkv_flush_job> xkv_select(const std::vector<xkv_token> & tokens, const xkv_select_rule & rule) {
    std::vector<const xkv_token *> exact; // those that may leave
    uint32_t                       n_first = 0;
    for (const auto & token : tokens) {
        // after positions were divided or shifted, more tokens can have the first ones
        const bool first = token.pos < (llama_pos) rule.n_sink && n_first++ < rule.n_sink;
        if (!first && !token.sink) {
            exact.push_back(&token);
        }
    }
    if (exact.size() <= rule.n_window) {
        return {};
    }
    const size_t n_leave = exact.size() - rule.n_window;

    std::vector<xkv_flush_job> jobs;
    for (size_t i = 0; i < n_leave;) {
        // a chunk holds tokens of the same sequences
        size_t end = i + 1;
        while (end < exact.size() && end - i < rule.n_chunk && exact[end]->pos < exact[i]->pos + (llama_pos) rule.n_chunk &&
               exact[end]->seqs == exact[i]->seqs) {
            end++;
        }
        if (end > n_leave) {
            break;
        }
        xkv_flush_job job = { 0, exact[i]->pos, exact[i]->seqs, {}, {} };
        for (; i < end; ++i) {
            job.cells.push_back(exact[i]->cell);
            job.offsets.push_back(exact[i]->pos - job.pos);
        }
        jobs.push_back(std::move(job));
    }
    return jobs;
}

std::vector<uint32_t> xkv_job_cells(const std::vector<xkv_flush_job> & jobs) {
    std::vector<uint32_t> res;
    for (const auto & job : jobs) {
        res.insert(res.end(), job.cells.begin(), job.cells.end());
    }
    return res;
}

std::vector<uint32_t> xkv_select_sinks(const std::vector<uint32_t> & cells, const std::vector<float> & drain, size_t n_max) {
    std::vector<std::pair<float, uint32_t>> found; // the least values first
    for (size_t i = 0; i < cells.size(); ++i) {
        if (drain[i] < XKV_TEXT_SINK) {
            found.emplace_back(drain[i], cells[i]);
        }
    }
    std::sort(found.begin(), found.end());
    found.resize(std::min(found.size(), n_max));

    std::vector<uint32_t> res;
    for (const auto & [value, cell] : found) {
        res.push_back(cell);
    }
    return res;
}

void xkv_leave_out(std::vector<xkv_flush_job> & jobs, const std::vector<uint32_t> & cells) {
    for (auto & job : jobs) {
        size_t n = 0;
        for (size_t i = 0; i < job.cells.size(); ++i) {
            if (std::find(cells.begin(), cells.end(), job.cells[i]) == cells.end()) {
                job.cells[n]     = job.cells[i];
                job.offsets[n++] = job.offsets[i];
            }
        }
        job.cells.resize(n);
        job.offsets.resize(n);
    }
    jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const xkv_flush_job & job) { return job.cells.empty(); }), jobs.end());
}

uint32_t xkv_select_stage(const std::vector<uint32_t> & n_slot, uint32_t first, uint32_t n_chunk, size_t n) {
    uint32_t stage = first;
    while (stage < n_slot.size() && n > n_slot[stage] / n_chunk) {
        stage++;
    }
    return stage;
}
