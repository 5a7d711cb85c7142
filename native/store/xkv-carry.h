#pragma once

#include "base/xkv-graph.h"
#include "store/xkv-store.h"

#include <cstdint>
#include <vector>

// stored tokens that are read or written at once: bounds scratch
static const uint32_t XKV_CARRY_BLOCK = 256;

// Rewrites the coefficients of chunks for other directions of one kind of one group, in the store's next stage or, without
// one, in the present. turn [rank, rank now] is old coefficients to new ones; when it is empty, directions keep their places.
void xkv_carry_over(xkv_graph & graph, llama_context * lctx, const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream,
                    const std::vector<uint32_t> & chunks, const std::vector<float> & turn, const xkv_store::layout * next);
