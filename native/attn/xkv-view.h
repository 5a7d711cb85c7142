#pragma once

#include "store/xkv-config.h"
#include "store/xkv-store.h"
#include "window/xkv-chunks.h"

#include <cstdint>
#include <vector>

// What the graph of a micro-batch reads of a cache: its streams, and what is stored of them.
struct xkv_view {
    const xkv_setup *                    setup;
    const xkv_store *                    store;
    const std::vector<xkv_chunk_table> * tables; // per stream

    uint32_t n_slot   = 0; // padded, so that graphs can be reused
    uint32_t stream_0 = 0;
    uint32_t n_stream = 0;

    ggml_backend_buffer_t * graph_memory = nullptr; // to be told where the graph's tensors are

    // of the micro-batch's i-th stream
    const xkv_chunk_table & table(uint32_t i) const { return (*tables)[stream_0 + i]; }

    const xkv_chunk_table & table_of(llama_seq_id seq_id) const { return (*tables)[tables->size() == 1 ? 0 : seq_id]; }
};
