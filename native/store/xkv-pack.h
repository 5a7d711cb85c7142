#pragma once

#include "ggml.h"

#include <cstddef>
#include <cstdint>

// Rows of numbers as tiles (ops/xkv_attn/xkv-tiles.h), on the host. n_row is a multiple of 16, n_col of the tile's columns.

size_t xkv_packed_size(ggml_type type, size_t n_row, size_t n_col);

// x [n_row, n_col], rows follow each other
void xkv_pack(ggml_type type, const float * x, size_t n_row, size_t n_col, uint8_t * packed);
void xkv_unpack(ggml_type type, const uint8_t * packed, size_t n_row, size_t n_col, float * x);
