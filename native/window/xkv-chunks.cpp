#include "window/xkv-chunks.h"

#include <algorithm>

std::vector<uint32_t> xkv_chunk::slots(llama_pos p0, llama_pos p1, bool inside) const {
    std::vector<uint32_t> res;
    for (uint32_t i = 0; i < n; ++i) {
        const llama_pos p = pos + offsets[i];
        if ((p >= p0 && p < p1) == inside) {
            res.push_back(i);
        }
    }
    return res;
}

std::vector<uint32_t> xkv_chunk_table::used() const {
    std::vector<uint32_t> res;
    for (uint32_t ic = 0; ic < chunks.size(); ++ic) {
        if (chunks[ic].n > 0) {
            res.push_back(ic);
        }
    }
    return res;
}

std::vector<uint32_t> xkv_chunk_table::free(size_t n_max) const {
    std::vector<uint32_t> res;
    for (uint32_t ic = 0; ic < chunks.size() && res.size() < n_max; ++ic) {
        if (chunks[ic].n == 0) {
            res.push_back(ic);
        }
    }
    return res;
}

uint32_t xkv_chunk_table::n_slot() const {
    uint32_t n = chunks.size();
    while (n > 0 && chunks[n - 1].n == 0) {
        n--;
    }
    return n * n_chunk;
}

uint32_t xkv_chunk_table::n_token() const {
    uint32_t n = 0;
    for (const auto & chunk : chunks) {
        n += chunk.n;
    }
    return n;
}

uint32_t xkv_chunk_table::n_token(llama_seq_id seq_id) const {
    uint32_t n = 0;
    for (const auto & chunk : chunks) {
        n += chunk.seqs.test(seq_id) ? chunk.n : 0;
    }
    return n;
}

std::vector<uint32_t> xkv_chunk_table::find(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    std::vector<uint32_t> res;
    for (uint32_t ic = 0; ic < chunks.size(); ++ic) {
        const auto & chunk = chunks[ic];
        if (chunk.n > 0 && chunk.seqs.test(seq_id) && !chunk.slots(p0, p1).empty()) {
            res.push_back(ic);
        }
    }
    return res;
}

llama_pos xkv_chunk_table::pos_min(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & chunk : chunks) {
        if (chunk.n > 0 && chunk.seqs.test(seq_id)) {
            res = res < 0 ? chunk.first() : std::min(res, chunk.first());
        }
    }
    return res;
}

llama_pos xkv_chunk_table::pos_max(llama_seq_id seq_id) const {
    llama_pos res = -1;
    for (const auto & chunk : chunks) {
        if (chunk.n > 0 && chunk.seqs.test(seq_id)) {
            res = std::max(res, chunk.end() - 1);
        }
    }
    return res;
}

void xkv_chunk_table::take(uint32_t ic, const std::vector<uint32_t> & slots) {
    auto & chunk = chunks[ic];

    std::vector<uint16_t> offsets;
    for (uint32_t i : slots) {
        offsets.push_back(chunk.offsets[i]);
    }
    chunk.offsets = std::move(offsets);
    chunk.n       = chunk.offsets.size();
    chunk         = chunk.n > 0 ? chunk : xkv_chunk();
}

void xkv_chunk_table::seq_rm(uint32_t ic, llama_seq_id seq_id) {
    chunks[ic].seqs.reset(seq_id);
    if (chunks[ic].seqs.none()) {
        chunks[ic] = xkv_chunk();
    }
}

void xkv_chunk_table::seq_keep(llama_seq_id seq_id) {
    for (auto & chunk : chunks) {
        const bool keep = chunk.n > 0 && chunk.seqs.test(seq_id);
        chunk.seqs.reset();
        chunk.seqs.set(seq_id, keep);
        chunk = keep ? chunk : xkv_chunk();
    }
}

void xkv_chunk_table::clear() {
    std::fill(chunks.begin(), chunks.end(), xkv_chunk());
}

void xkv_chunk_table::copy(const xkv_chunk_table & src, llama_seq_id seq_id) {
    chunks = src.chunks;
    for (auto & chunk : chunks) {
        chunk.seqs.reset();
        chunk.seqs.set(seq_id, chunk.n > 0);
    }
}
