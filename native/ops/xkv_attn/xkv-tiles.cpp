#include "xkv-tiles.h"

#include <algorithm>
#include <cstring>

// a block's codes, unsigned
static inline void xkv_read_codes(ggml_type type, const uint8_t * block, uint8_t * codes) {
    const uint8_t * qs = block + 2;
    switch (type) {
    case GGML_TYPE_Q8_0:
        for (int i = 0; i < 32; ++i) {
            codes[i] = (uint8_t) (qs[i] + 128);
        }
        break;
    case GGML_TYPE_Q5_0: {
        uint32_t qh;
        memcpy(&qh, block + 2, 4);
        for (int i = 0; i < 32; ++i) {
            codes[i] = (uint8_t) ((i < 16 ? block[6 + i] & 15 : block[6 + i - 16] >> 4) | ((qh >> i) & 1) << 4);
        }
        break;
    }
    case GGML_TYPE_Q4_0:
        for (int i = 0; i < 32; ++i) {
            codes[i] = i < 16 ? qs[i] & 15 : qs[i - 16] >> 4;
        }
        break;
    case GGML_TYPE_Q2_0:
        for (int i = 0; i < 64; ++i) {
            codes[i] = (qs[i / 4] >> 2 * (i % 4)) & 3;
        }
        break;
    case GGML_TYPE_Q1_0:
        for (int i = 0; i < 128; ++i) {
            codes[i] = (qs[i / 8] >> (i % 8)) & 1;
        }
        break;
    default:
        GGML_ABORT("no codes of type %s", ggml_type_name(type));
    }
}

static inline void xkv_write_codes(ggml_type type, const uint8_t * codes, uint8_t * block) {
    memset(block + 2, 0, ggml_type_size(type) - 2);
    uint8_t * qs = block + 2;
    switch (type) {
    case GGML_TYPE_Q8_0:
        for (int i = 0; i < 32; ++i) {
            qs[i] = (uint8_t) (codes[i] - 128);
        }
        break;
    case GGML_TYPE_Q5_0: {
        uint32_t qh = 0;
        for (int i = 0; i < 32; ++i) {
            block[6 + i % 16] |= (codes[i] & 15) << (i < 16 ? 0 : 4);
            qh |= (uint32_t) (codes[i] >> 4) << i;
        }
        memcpy(block + 2, &qh, 4);
        break;
    }
    case GGML_TYPE_Q4_0:
        for (int i = 0; i < 32; ++i) {
            qs[i % 16] |= codes[i] << (i < 16 ? 0 : 4);
        }
        break;
    case GGML_TYPE_Q2_0:
        for (int i = 0; i < 64; ++i) {
            qs[i / 4] |= codes[i] << 2 * (i % 4);
        }
        break;
    case GGML_TYPE_Q1_0:
        for (int i = 0; i < 128; ++i) {
            qs[i / 8] |= codes[i] << (i % 8);
        }
        break;
    default:
        GGML_ABORT("no codes of type %s", ggml_type_name(type));
    }
}

// byte and shift of the low part of column c of row r
struct xkv_place {
    size_t byte;
    int    shift;
};

static inline xkv_place xkv_find_code(ggml_type type, int r, int c) {
    const int    k  = c / 4;
    const size_t at = 4 * r + c % 4;
    switch (type) {
    case GGML_TYPE_Q8_0:
        return { at + 64 * k, 0 };
    case GGML_TYPE_Q2_0:
        return { at + 64 * (k / 4), 2 * (k % 4) };
    case GGML_TYPE_Q1_0:
        return { at + 64 * (k / 8), k % 8 };
    default:
        return { at + 64 * (k / 2), 4 * (k % 2) };
    }
}

static void xkv_pack_floats(ggml_type type, const void * rows, size_t nb1, void * tile) {
    const size_t size = ggml_type_size(type);
    for (int r = 0; r < XKV_TILE_ROWS; ++r) {
        for (int c = 0; c < (int) xkv_tile_cols(type); ++c) {
            memcpy((uint8_t *) tile + (XKV_TILE_ROWS * c + r) * size, (const uint8_t *) rows + r * nb1 + c * size, size);
        }
    }
}

static void xkv_unpack_floats(ggml_type type, const void * tile, void * rows, size_t nb1) {
    const size_t size = ggml_type_size(type);
    for (int r = 0; r < XKV_TILE_ROWS; ++r) {
        for (int c = 0; c < (int) xkv_tile_cols(type); ++c) {
            memcpy((uint8_t *) rows + r * nb1 + c * size, (const uint8_t *) tile + (XKV_TILE_ROWS * c + r) * size, size);
        }
    }
}

// four columns of a row lie together, and a code is its number + 128
static void xkv_copy_bytes(const uint8_t * from, size_t step_from, uint8_t * to, size_t step_to) {
    for (int k = 0; k < 8; ++k) {
        uint32_t four;
        memcpy(&four, from + k * step_from, sizeof(four));
        four ^= 0x80808080u;
        memcpy(to + k * step_to, &four, sizeof(four));
    }
}

// the compiler makes loops without branches of each type's
template <ggml_type type> static void xkv_pack_codes(const uint8_t * rows, size_t nb1, uint8_t * out) {
    const int n = (int) xkv_tile_cols(type);

    memset(out, 0, xkv_tile_bytes(type, XKV_TILE_ROWS, n));
    for (int r = 0; r < XKV_TILE_ROWS; ++r) {
        const uint8_t * block = rows + r * nb1;

        memcpy(out + 2 * r, block, 2);
        if (type == GGML_TYPE_Q8_0) {
            xkv_copy_bytes(block + 2, 4, out + 32 + 4 * r, 64);
            continue;
        }
        uint8_t codes[128];
        xkv_read_codes(type, block, codes);
        for (int c = 0; c < n; ++c) {
            const auto    at   = xkv_find_code(type, r, c);
            const uint8_t code = type == GGML_TYPE_Q5_0 ? codes[c] & 15 : codes[c];
            out[32 + at.byte] |= code << at.shift;
            if (type == GGML_TYPE_Q5_0) {
                out[32 + 256 + 4 * r + c % 4] |= (codes[c] >> 4) << (c / 4);
            }
        }
    }
}

template <ggml_type type> static void xkv_unpack_codes(const uint8_t * in, uint8_t * rows, size_t nb1) {
    const int n    = (int) xkv_tile_cols(type);
    const int bits = type == GGML_TYPE_Q8_0 ? 8 : type == GGML_TYPE_Q2_0 ? 2 : type == GGML_TYPE_Q1_0 ? 1 : 4;

    for (int r = 0; r < XKV_TILE_ROWS; ++r) {
        uint8_t * block = rows + r * nb1;

        memcpy(block, in + 2 * r, 2);
        if (type == GGML_TYPE_Q8_0) {
            xkv_copy_bytes(in + 32 + 4 * r, 64, block + 2, 4);
            continue;
        }
        uint8_t codes[128];
        for (int c = 0; c < n; ++c) {
            const auto at = xkv_find_code(type, r, c);
            codes[c]      = (in[32 + at.byte] >> at.shift) & ((1 << bits) - 1);
            if (type == GGML_TYPE_Q5_0) {
                codes[c] |= ((in[32 + 256 + 4 * r + c % 4] >> (c / 4)) & 1) << 4;
            }
        }
        xkv_write_codes(type, codes, block);
    }
}

void xkv_tile_pack(ggml_type type, const void * rows, size_t nb1, void * tile) {
    const uint8_t * in  = (const uint8_t *) rows;
    uint8_t *       out = (uint8_t *) tile;
    switch (type) {
    case GGML_TYPE_Q8_0:
        return xkv_pack_codes<GGML_TYPE_Q8_0>(in, nb1, out);
    case GGML_TYPE_Q5_0:
        return xkv_pack_codes<GGML_TYPE_Q5_0>(in, nb1, out);
    case GGML_TYPE_Q4_0:
        return xkv_pack_codes<GGML_TYPE_Q4_0>(in, nb1, out);
    case GGML_TYPE_Q2_0:
        return xkv_pack_codes<GGML_TYPE_Q2_0>(in, nb1, out);
    case GGML_TYPE_Q1_0:
        return xkv_pack_codes<GGML_TYPE_Q1_0>(in, nb1, out);
    default:
        return xkv_pack_floats(type, rows, nb1, tile);
    }
}

void xkv_tile_unpack(ggml_type type, const void * tile, void * rows, size_t nb1) {
    const uint8_t * in  = (const uint8_t *) tile;
    uint8_t *       out = (uint8_t *) rows;
    switch (type) {
    case GGML_TYPE_Q8_0:
        return xkv_unpack_codes<GGML_TYPE_Q8_0>(in, out, nb1);
    case GGML_TYPE_Q5_0:
        return xkv_unpack_codes<GGML_TYPE_Q5_0>(in, out, nb1);
    case GGML_TYPE_Q4_0:
        return xkv_unpack_codes<GGML_TYPE_Q4_0>(in, out, nb1);
    case GGML_TYPE_Q2_0:
        return xkv_unpack_codes<GGML_TYPE_Q2_0>(in, out, nb1);
    case GGML_TYPE_Q1_0:
        return xkv_unpack_codes<GGML_TYPE_Q1_0>(in, out, nb1);
    default:
        return xkv_unpack_floats(type, tile, rows, nb1);
    }
}
