#pragma once

#include "store/xkv-store.h"

#include <array>
#include <cstdint>
#include <vector>

// What becomes of the coefficients of a token: those at the places `to` are rows [to, from] times those at the places `from`; all
// others keep their places.
struct xkv_recode {
    xkv_floats            rows;
    std::vector<uint32_t> from;
    std::vector<uint32_t> to;
};

// of K and of V
using xkv_recodes = std::array<xkv_recode, 2>;

// all new coefficients are rows [n_to, n_from] times all old ones
xkv_recode xkv_recode_all(xkv_floats rows, uint32_t n_to, uint32_t n_from);

// bytes of the rows
size_t xkv_n_byte(const xkv_recodes & turns);

// the next stage's basis from rows that those of the store, if it has any, begin with
xkv_recode xkv_keep_basis(xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, xkv_floats rows,
                          const xkv_store::layout & next, int n_thread);

// Rewrites the coefficients of chunks for other directions of one kind of one group.
void xkv_carry_over(const xkv_store & store, xkv_store::kind kd, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                    const xkv_recode & turn, int n_thread);

// Makes the next stage's coefficients of a group from the present ones, over which they are written where they have their place in
// the store; chunks ascend. Returns the bytes of the turns
// and the most of chunks that waited for their place.
size_t xkv_carry_stage(const xkv_store & store, uint32_t ig, uint32_t stream, const std::vector<uint32_t> & chunks,
                       const xkv_recodes & turns, const xkv_store::layout & next, int n_thread);

// Makes coefficients of one kind of one group of store `to` from those of the chunks 0, 1, ... of another store's only stream.
void xkv_carry_into(const xkv_store & from, const xkv_store & to, xkv_store::kind kd, uint32_t ig, uint32_t stream,
                    const std::vector<uint32_t> & chunks, const xkv_recode & turn, int n_thread);
