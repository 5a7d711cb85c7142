#pragma once

#include "store/xkv-store.h"

#include <cstdint>
#include <vector>

// Rewrites the coefficients of chunks for other directions of one kind of one group, in the store's next stage or, without
// one, in the present. turn [rank, rank now] is old coefficients to new ones; when it is empty, directions keep their places.
void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_floats & turn, const xkv_store::layout * next, int n_thread);
