#pragma once

#include "window/xkv-chunks.h"

#include <cstdint>
#include <vector>

// Which tokens leave the window, and into which chunks: values in, values out.

// tokens that fill one chunk
struct xkv_flush_job {
    uint32_t    ic;  // chunk
    llama_pos   pos; // of the chunk: that of the first token, which can have stayed
    xkv_seq_set seqs;

    std::vector<uint32_t> cells;   // in the window, at most n_chunk
    std::vector<uint16_t> offsets; // of their positions from pos, ascending

    xkv_chunk chunk() const { return { pos, (uint32_t) cells.size(), seqs, offsets }; }
};

struct xkv_select_rule {
    uint32_t n_sink;   // first positions that stay
    uint32_t n_window; // fewest recent tokens that stay
    uint32_t n_chunk;  // positions of a chunk
};

// The oldest tokens of a sequence, given by ascending positions, in jobs without chunks. All tokens of a job belong to the same
// sequences; the last job is left out where recent tokens would have to follow it.
std::vector<xkv_flush_job> xkv_select(const std::vector<xkv_token> & tokens, const xkv_select_rule & rule);

// cells of all jobs, in order
std::vector<uint32_t> xkv_job_cells(const std::vector<xkv_flush_job> & jobs);

// At most n_max cells with the least drain (see xkv_flush::value_drain) below the threshold of attention sinks.
std::vector<uint32_t> xkv_select_sinks(const std::vector<uint32_t> & cells, const std::vector<float> & drain, size_t n_max);

// takes cells out of the jobs, and jobs that nothing is left of
void xkv_leave_out(std::vector<xkv_flush_job> & jobs, const std::vector<uint32_t> & cells);

// the first of the stages with these slots, from a given one on, that has room for n chunks; their number when none has
uint32_t xkv_select_stage(const std::vector<uint32_t> & n_slot, uint32_t first, uint32_t n_chunk, size_t n);
