#pragma once

#include "base/xkv-bytes.h"
#include "store/xkv-store.h"
#include "window/xkv-chunks.h"

#include <cstdint>
#include <memory>
#include <vector>

// bytes of a state that are looked at where they stand
struct xkv_saved_span {
    const uint8_t * data = nullptr;
    size_t          size = 0;
};

// What a saved state holds of a stream's store, and how a cache is going to take it.
struct xkv_saved_store {
    struct saved_chunk {
        xkv_chunk       chunk;
        const uint8_t * coef;
    };

    std::vector<uint32_t>    signature; // of the stage that the bytes are of
    xkv_saved_span           bases;     // the stream's own; of calibrated ones none
    xkv_saved_span           online;
    std::vector<saved_chunk> chunks;
    xkv_seq_set              seqs;    // of all chunks
    size_t                   n_token; // of all chunks

    size_t chunk_bytes; // of coefficients

    uint32_t                   stage = 0; // that the store goes to, or stays in
    std::unique_ptr<xkv_store> image;     // where the bytes are not of that stage: coefficients are made anew
};
