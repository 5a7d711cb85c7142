#pragma once

#include "store/xkv-store.h"

#include <array>
#include <cstdint>
#include <vector>

// What becomes of the coefficients of a token: those at the places `to` are rows [to, from] times those at the places `from`; all
// others keep their places.
struct xkv_turn {
    xkv_floats            rows;
    std::vector<uint32_t> from;
    std::vector<uint32_t> to;
};

// of K and of V
using xkv_turns = std::array<xkv_turn, 2>;

// all new coefficients are rows [n_to, n_from] times all old ones
xkv_turn xkv_turn_all(xkv_floats rows, uint32_t n_to, uint32_t n_from);

// Rewrites the coefficients of chunks for other directions of one kind of one group.
void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_turn & turn, int n_thread);

// Makes the next stage's coefficients of a group from the present ones, over which they are written where they have their place in
// the store; chunks ascend. Returns the most bytes of chunks that waited for theirs.
size_t xkv_carry_stage(const xkv_store & store, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks, const xkv_turns & turns,
                       const xkv_store::layout & next, int n_thread);
