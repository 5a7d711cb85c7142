#pragma once

#include "store/xkv-store.h"

#include <cstdint>
#include <vector>

// What becomes of the coefficients of a token: those at the places `to` are rows [to, from] times those at the places `from`; all
// others keep their places.
struct xkv_turn {
    xkv_floats            rows;
    std::vector<uint32_t> from;
    std::vector<uint32_t> to;
};

// all new coefficients are rows [n_to, n_from] times all old ones
xkv_turn xkv_turn_all(xkv_floats rows, uint32_t n_to, uint32_t n_from);

// Rewrites the coefficients of chunks for other directions of one kind of one group, in the store's next stage or, without
// one, in the present.
void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_turn & turn, const xkv_store::layout * next, int n_thread);
