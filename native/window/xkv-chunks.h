#pragma once

#include "llama.h"

#include "llama-cparams.h"

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <vector>

using xkv_seq_set = std::bitset<LLAMA_MAX_SEQ>;

// Tokens of one set of sequences whose positions lie within n_chunk of each other, kept as coefficients in the chunk's
// first n slots. Positions are missing where tokens stayed exact or were removed, and are the same where they were divided.
struct xkv_chunk {
    llama_pos   pos = -1; // origin of the chunk's RoPE frame: where the first token was; below 0 where that left and others moved
    uint32_t    n   = 0;  // tokens; 0: the chunk is free
    xkv_seq_set seqs;

    std::vector<uint16_t> offsets; // of the tokens' positions from pos, never descending [n]

    llama_pos first() const { return n > 0 ? pos + offsets.front() : pos; }
    llama_pos end() const { return n > 0 ? pos + offsets.back() + 1 : pos; }

    // slots of the tokens at positions inside [p0, p1), or outside, ascending
    std::vector<uint32_t> slots(llama_pos p0, llama_pos p1, bool inside = true) const;
};

// The chunks of one stream; a chunk's index is its place in the store.
class xkv_chunk_table {
public:
    xkv_chunk_table(uint32_t n_chunk, size_t size) : n_chunk(n_chunk), chunks(size) {}

    size_t            size() const { return chunks.size(); }
    const xkv_chunk & operator[](uint32_t ic) const { return chunks[ic]; }

    std::vector<uint32_t> used() const;
    std::vector<uint32_t> free(size_t n_max) const; // the first ones

    bool     empty() const { return n_slot() == 0; }
    uint32_t n_slot() const; // slots up to the end of the last chunk in use
    uint32_t n_token() const;
    uint32_t n_token(llama_seq_id seq_id) const;

    // chunks of a sequence with tokens at positions [p0, p1)
    std::vector<uint32_t> find(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;

    // -1 when the sequence has no tokens here
    llama_pos pos_min(llama_seq_id seq_id) const;
    llama_pos pos_max(llama_seq_id seq_id) const;

    void put(uint32_t ic, xkv_chunk && chunk) { chunks[ic] = std::move(chunk); }

    // leaves the tokens in these slots, which become the first ones
    void take(uint32_t ic, const std::vector<uint32_t> & slots);

    void move(uint32_t ic, llama_pos delta) { chunks[ic].pos += delta; }

    void seq_add(uint32_t ic, llama_seq_id seq_id) { chunks[ic].seqs.set(seq_id); }
    void seq_rm(uint32_t ic, llama_seq_id seq_id); // frees the chunk with its last sequence
    void seq_keep(llama_seq_id seq_id);            // of all chunks

    void clear();

    // the chunks of another stream, for one sequence
    void copy(const xkv_chunk_table & src, llama_seq_id seq_id);

private:
    uint32_t n_chunk; // tokens

    std::vector<xkv_chunk> chunks;
};

// a token in a cell of the window
struct xkv_token {
    llama_pos   pos;
    uint32_t    cell;
    xkv_seq_set seqs;
    bool        sink; // an attention sink in the text, which stays
};
