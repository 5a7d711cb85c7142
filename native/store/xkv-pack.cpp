#include "store/xkv-pack.h"

#include "base/xkv-codec.h"
#include "ops/xkv_attn/xkv-tiles.h"

#include <vector>

size_t xkv_packed_size(ggml_type type, size_t n_row, size_t n_col) {
    return xkv_tile_bytes(type, n_row, n_col);
}

// f(row, column, bytes before it) for each tile
template <typename F> static void xkv_each_tile(ggml_type type, size_t n_row, size_t n_col, F && f) {
    const size_t n_tile = xkv_tile_cols(type);
    GGML_ASSERT(n_row % XKV_TILE_ROWS == 0 && n_col % n_tile == 0);

    size_t at = 0;
    for (size_t r = 0; r < n_row; r += XKV_TILE_ROWS) {
        for (size_t c = 0; c < n_col; c += n_tile) {
            f(r, c, at);
            at += xkv_tile_bytes(type, XKV_TILE_ROWS, n_tile);
        }
    }
}

void xkv_pack(ggml_type type, const float * x, size_t n_row, size_t n_col, uint8_t * packed) {
    const size_t n_byte = ggml_row_size(type, n_col);

    std::vector<uint8_t> rows(n_row * n_byte);
    xkv_encode(type, x, rows.data(), n_row * n_col);
    xkv_each_tile(type, n_row, n_col, [&](size_t r, size_t c, size_t at) {
        xkv_tile_pack(type, rows.data() + r * n_byte + ggml_row_size(type, c), n_byte, packed + at);
    });
}

void xkv_unpack(ggml_type type, const uint8_t * packed, size_t n_row, size_t n_col, float * x) {
    const size_t n_byte = ggml_row_size(type, n_col);

    std::vector<uint8_t> rows(n_row * n_byte);
    xkv_each_tile(type, n_row, n_col, [&](size_t r, size_t c, size_t at) {
        xkv_tile_unpack(type, packed + at, rows.data() + r * n_byte + ggml_row_size(type, c), n_byte);
    });
    xkv_decode(type, rows.data(), x, n_row * n_col);
}
