// Tiles: how rows of numbers are packed for XKV_ATTN, so that one register holds 4 columns of each of 16 rows and a sum never
// runs across it.
//
// A tile is 16 rows by one quantization block of columns and takes the bytes of the 16 blocks it is made of: 16 scales
// (f16), then codes. With u[k] the 64 bytes of columns 4k to 4k + 3, row by row, and codes unsigned:
//   q8_0  32 columns   8 times 64 bytes: u[k] (codes + 128)
//   q4_0  32 columns   4 times 64 bytes: u[2j] | u[2j + 1] << 4
//   q5_0  32 columns   as q4_0, then 64 bytes with the fifth bit of u[k] as bit k
//   q2_0  64 columns   4 times 64 bytes: u[4j] | u[4j + 1] << 2 | u[4j + 2] << 4 | u[4j + 3] << 6
//   q1_0  128 columns  4 times 64 bytes: bit i is u[8j + i]
//   f16, f32           16 columns of 16 numbers
//
// Coefficients of a chunk: K, then V. Each by segment (type); K by 16 tokens, then columns of directions; V by 16 directions, then
// columns of tokens. Bases of a layer: K by KV head, then V; each by segment; K by 16 directions,
// then columns of a head's numbers; V by 16 of a head's numbers, then columns of directions.

#pragma once

#include "ggml.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define XKV_TILE_ROWS 16

// columns of a tile
static inline int64_t xkv_tile_cols(enum ggml_type type) {
    const int64_t n = ggml_blck_size(type);
    return n < 16 ? 16 : n;
}

// bytes of n_row rows of n_col columns, multiples of a tile
static inline size_t xkv_tile_bytes(enum ggml_type type, int64_t n_row, int64_t n_col) {
    return n_row * ggml_row_size(type, n_col);
}

// between 16 rows of one block of columns and a tile; rows are nb1 bytes apart
void xkv_tile_pack(enum ggml_type type, const void * rows, size_t nb1, void * tile);
void xkv_tile_unpack(enum ggml_type type, const void * tile, void * rows, size_t nb1);

#ifdef __cplusplus
}
#endif
